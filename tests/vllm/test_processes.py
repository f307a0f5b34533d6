"""Engines as they are deployed: several processes, two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import PROMPTS, Cache, eventually

HERE = Path(__file__).parent


class Deployed:
    """An LLM over several processes, until it is closed."""

    def __init__(self, cache: Cache, model: Path, ranks: int) -> None:
        spec = {
            "model": str(model),
            "prompts": PROMPTS,
            "ranks": ranks,
            "kv_transfer_config": cache.connector(client_wait_ms=5000, **{"fence_ms": 1000}),
        }
        self._log = open(cache.directory / "processes.log", "ab")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "tp_worker.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=HERE,
        )

    def answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        log = Path(self._log.name).read_text()
        raise AssertionError(f"it ended without an answer:\n{log[-6000:]}")

    def close(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.close()
        self._process.wait(120)


def test_two_ranks_store_and_load_their_halves(cache: Cache, model: Path) -> None:
    first = Deployed(cache, model, ranks=2)
    stored = first.answer()
    assert stored["cached"] == [0, 0]
    eventually("13 blocks, each of two halves, are stored", lambda: cache.metric("commit_blocks_count") == 13)
    assert cache.stats()["layout"]["tp_size"] == 2
    first.close()
    second = Deployed(cache, model, ranks=2)
    loaded = second.answer()
    second.close()
    assert loaded == {"tokens": stored["tokens"], "cached": [192, 224]}
    # Each rank loads its own half of each block.
    assert cache.metric("load_blocks_dram_count") == 26
