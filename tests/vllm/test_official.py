"""vLLM versions that no CPU build exists of: their scheduler with a model runner of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cache, eventually, prompt

from engine import QUIET

HERE = Path(__file__).parent
OFFICIAL = os.environ.get("OFFICIAL_VLLM", "")


@pytest.mark.parametrize("which", ["installed", "official"])
def test_the_scheduler_calls_the_connector_as_it_expects(cache: Cache, model: Path, which: str) -> None:
    path = [str(HERE)]
    if which == "official":
        if not OFFICIAL:
            pytest.skip("OFFICIAL_VLLM names no vLLM: cargo xtask e2e installs one")
        path.insert(0, OFFICIAL)
    prompts = [prompt(1, 200), prompt(2, 240), prompt(3, 33)]
    # An instance is an engine_id: each of these is one of its own.
    spec = {name: cache.connector() | {"engine_id": name} for name in ("first", "second", "third")}
    spec |= {"model": str(model), "prompts": prompts}
    environment = {**os.environ, **QUIET, "PYTHONPATH": ":".join(path), "VLLM_TARGET_DEVICE": "cpu"}
    ran = subprocess.run(
        [sys.executable, str(HERE / "official.py"), json.dumps(spec)], env=environment, capture_output=True, text=True
    )
    answers = [line for line in ran.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, f"{ran.stdout[-3000:]}\n{ran.stderr[-6000:]}"
    answer = json.loads(answers[0].removeprefix("ANSWER "))
    print(f"vLLM {answer['version']}")
    stored, loaded, squeezed = answer["stored"], answer["loaded"], answer["squeezed"]
    assert stored["cached"] == [0, 0, 0]
    assert loaded["cached"] == [192, 224, 32] and loaded["tokens"] == stored["tokens"]
    assert loaded["compared"] > 0
    assert squeezed["tokens"] == stored["tokens"] * 2 and squeezed["preempted"] > 0
    eventually("nothing is leased", lambda: cache.metric("leases_count") == 0)
