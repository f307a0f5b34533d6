"""Engines, caches and a reference, for stories about real vLLM processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model as tiny
import pytest

from engine import Engine, Nursery

SHARED = {
    "kv_connector": "KvringConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvring.vllm",
}


def prompt(seed: int, tokens: int) -> list[int]:
    """Deterministic tokens of the tiny model's vocabulary."""
    return [3 + (seed * 7919 + (2 * seed + 7) * i) % 500 for i in range(tokens)]


# 6 and 7 full blocks of 32 tokens, and a rest.
PROMPTS = [prompt(1, 200), prompt(2, 240)]


class Cache:
    """One kvring server's place: its socket, its settings, its counters."""

    def __init__(self, directory: Path, nursery: Nursery, model: Path) -> None:
        self.directory, self._nursery, self._model = directory, nursery, model
        self.socket = directory / "socket"
        self._engines: list[Engine] = []

    def connector(self, base: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        # A busy test machine is no reason to miss.
        own = {"cpu_cache_gb": 0.25, "server_recv_port": str(self.socket), "client_wait_ms": 2000, "hugepages": "off"}
        return {**(base or SHARED), "kv_connector_extra_config": {**own, **settings}}

    def engine(
        self, base: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **settings: Any
    ) -> Engine:
        transfer = self.connector(base, **settings)
        engine = self._nursery.engine(model=str(self._model), kv_transfer_config=transfer, **(options or {}))
        self._engines.append(engine)
        return engine

    def flexkv(self, instance_id: int, **environment: str) -> Engine:
        """An engine that knows nothing but FlexKV's settings."""
        said = {
            "FLEXKV_INSTANCE_NUM": "4",
            "FLEXKV_INSTANCE_ID": str(instance_id),
            "FLEXKV_CPU_CACHE_GB": "1",
            "FLEXKV_SERVER_RECV_PORT": f"ipc://{self.socket}",
            **environment,
        }
        engine = self._nursery.engine(
            model=str(self._model),
            kv_transfer_config={"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"},
            environment=said,
        )
        self._engines.append(engine)
        return engine

    def stats(self) -> dict[str, Any] | None:
        asked = subprocess.run(
            ["kvring", "stat", "--json", "--socket", str(self.socket)], capture_output=True, text=True
        )
        return json.loads(asked.stdout) if asked.returncode == 0 else None

    def metric(self, name: str) -> int:
        stats = self.stats()
        assert stats, "a server answers"
        return stats["metrics"][name]

    def server(self) -> int:
        stats = self.stats()
        assert stats, "a server answers"
        return stats["server_pid"]

    def kill_server(self) -> None:
        os.kill(self.server(), signal.SIGKILL)

    def corrupt_pool(self) -> int:
        """Flips the sign of every bf16 in the pool, behind everybody's back. Says how many bytes."""
        fds = Path(f"/proc/{self.server()}/fd")
        (pool,) = {fd for fd in fds.iterdir() if "kvring-pool" in os.readlink(fd)}
        flipped = 0
        with open(pool, "r+b") as memory:
            while chunk := memory.read(1 << 20):
                if any(chunk):
                    turned = bytes(b ^ 0x80 if i % 2 else b for i, b in enumerate(chunk))
                    memory.seek(-len(chunk), os.SEEK_CUR)
                    memory.write(turned)
                    flipped += len(chunk)
        return flipped

    def close(self) -> None:
        for engine in self._engines:
            try:
                os.kill(engine.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        stop_server(self.socket)


def stop_server(socket: str | Path) -> None:
    """Stops the server, also one that an instance was about to start when it ended."""
    for _ in range(5):
        stopped = subprocess.run(["kvring", "stop", "--socket", str(socket)], capture_output=True)
        if stopped.returncode == 0:
            return
        time.sleep(0.3)


def eventually(what: str, is_so: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def model(directory: Path) -> Path:
    return tiny.make(directory / "model")


@pytest.fixture(scope="session")
def nursery(directory: Path) -> Iterator[Nursery]:
    nursery = Nursery(directory / "engines.log")
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def plain(nursery: Nursery, model: Path) -> Iterator[Engine]:
    """A vLLM without any connector: what the tokens should be."""
    engine = nursery.engine(model=str(model), enable_prefix_caching=False)
    yield engine
    engine.close()


@pytest.fixture
def cache(tmp_path: Path, nursery: Nursery, model: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path, nursery, model)
    yield cache
    cache.close()
