"""What operators and routers see."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import zmq
from conftest import PROMPTS, Cache, eventually, prompt
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch


def test_prometheus_has_the_connectors_counters(cache: Cache) -> None:
    first, second = cache.engine(), cache.engine()
    first.generate(PROMPTS)
    eventually("stored", lambda: cache.metric("commit_blocks_count") == 13)
    second.generate(PROMPTS)
    # What happened in the last step is told with the next.
    second.generate([prompt(3, 40)])
    metrics = second.call(do="metrics")
    assert metrics["vllm:kvring_tokens_matched"] == 416
    assert metrics["vllm:kvring_blocks_loaded_dram"] == 13
    assert "vllm:kvring_load_seconds" in metrics
    first.generate([prompt(3, 40)])
    assert first.call(do="metrics")["vllm:kvring_blocks_stored"] >= 13


class Router:
    """Hears what an engine publishes."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.connect(self.endpoint)
        self._socket.subscribe(b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.shared: dict[bytes, Any] = {}
        self.removed = 0

    def listen(self) -> None:
        while self._socket.poll(50):
            for event in self._decoder.decode(self._socket.recv_multipart()[-1]).events:
                if isinstance(event, BlockStored) and event.medium == "CPU":
                    for block in event.block_hashes:
                        self.shared[block] = event
                if isinstance(event, BlockRemoved) and event.medium == "CPU":
                    for block in event.block_hashes:
                        self.removed += self.shared.pop(block, None) is not None

    def close(self) -> None:
        self._context.destroy(linger=0)


def test_a_router_hears_of_shared_blocks_and_of_their_end_whoever_evicts_them(cache: Cache) -> None:
    router = Router()
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": router.endpoint.replace("127.0.0.1", "*")}
    small = {"cpu_cache_gb": 1 / 1024}
    try:
        first = cache.engine(options={"kv_events_config": config}, **small)
        other = cache.engine(**small)
        first.generate([prompt(4, 40)])

        def hears(blocks: int) -> bool:
            # Events travel with steps.
            first.generate([prompt(4, 34)], tokens=2)
            router.listen()
            return len(router.shared) >= blocks

        first.generate([PROMPTS[0]])
        eventually("stored blocks are announced", lambda: hears(6))
        chain = sorted(router.shared.values(), key=lambda event: event.token_ids != PROMPTS[0][:32])
        assert chain[0].parent_block_hash is None and chain[0].block_size == 32
        parents = {event.block_hashes[0]: event.parent_block_hash for event in router.shared.values()}
        assert any(event.parent_block_hash == chain[0].block_hashes[0] for event in router.shared.values())
        assert all(parent is None or parent in parents for parent in parents.values())

        # 64 slots: what another instance stores evicts them.
        other.generate([prompt(100 + n, 960) for n in range(4)])

        def forgets() -> bool:
            hears(0)
            return router.removed >= 6

        eventually("evicted blocks are taken back", forgets)
    finally:
        router.close()
