"""Store, retrieve and look up 512 tokens (16 MiB in 32 blocks), as `lmcache bench server` does.

    python control.py [--requests 200]

8 layers of (2, 256 blocks, 16 tokens, 8 heads, 128) float16 in ordinary memory; every request is of new
tokens. Store and retrieve are from submission to the end of the copy, one at a time; what comes back is
compared. Prints p50, p90 and p99 in ms.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time

import torch

import kvring

LAYERS, BLOCKS, SIZE, HEADS, HEAD, TOKENS = 8, 256, 16, 8, 128, 512
COUNT = TOKENS // SIZE


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, BLOCKS, SIZE, HEADS, HEAD, generator=generator).half().transpose(0, 1) for _ in range(LAYERS)
    ]


def ended(agent: kvring.Agent) -> kvring.Ended:
    while True:
        if agent.wait(at_most_ms=1000):
            (end,) = agent.poll()
            return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        settings = {"server_recv_port": f"{place}/s", "cpu_cache_gb": 2, "instance_num": 2}
        ours, theirs = kvring.Memory([kvring.Group(tensors(1))]), kvring.Memory([kvring.Group(tensors(2))])
        what = kvring.Layout(
            model="bench", dtype="float16", tokens_per_block=SIZE, layers=LAYERS, kv_heads=HEADS, head_size=HEAD,
            kv_layout=ours.describe(), block_bytes=ours.block_bytes,
        )  # fmt: skip
        token = kvring.new_token()
        storing = kvring.Agent(what, ours, token=kvring.new_token(), instance_id=0, **settings)
        loading = kvring.Agent(what, theirs, token=token, instance_id=1, **settings)
        scheduler = kvring.Instance(token=token, instance_id=1, client_wait_ms=1000, **settings)
        root = kvring.namespace_root([("model", "bench")])
        times: dict[str, list[float]] = {"lookup miss": [], "store": [], "lookup hit": [], "retrieve": []}

        def timed(name: str, started: float) -> None:
            times[name].append(time.perf_counter() - started)

        time.sleep(1)
        for request in range(arguments.requests):
            chain = kvring.KeyChain(root, SIZE)
            chain.extend([request * TOKENS + i for i in range(TOKENS)])
            first = request * COUNT % BLOCKS
            pages = list(range(first, first + COUNT))
            started = time.perf_counter()
            assert scheduler.match(chain.keys) == (0, None)
            timed("lookup miss", started)
            started = time.perf_counter()
            storing.store(request, b"", 0, chain.keys, pages)
            assert not ended(storing).missed
            timed("store", started)
            started = time.perf_counter()
            blocks, lease = scheduler.match(chain.keys)
            timed("lookup hit", started)
            assert blocks == COUNT and lease
            target = [BLOCKS - 1 - page for page in pages]
            started = time.perf_counter()
            loading.load(request, lease, 0, chain.keys, target)
            assert not ended(loading).missed
            timed("retrieve", started)
            scheduler.release(lease)
            for mine, other in zip(ours.groups[0].tensors, theirs.groups[0].tensors):
                assert torch.equal(mine[pages], other[target]), "wrong bytes"
        for closing in (storing, loading, scheduler):
            closing.close()
        subprocess.run([kvring.server_program() or "kvring", "stop", "--socket", f"{place}/s"], check=False)
    print(f"{arguments.requests} requests of {TOKENS} tokens, {ours.block_bytes * COUNT >> 20} MiB, all bytes equal")
    print(f"{'':12} {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9}")
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=100)
        print(f"{name:12} {statistics.median(values) * 1e3:9.3f} {cuts[89] * 1e3:9.3f} {cuts[98] * 1e3:9.3f}")


if __name__ == "__main__":
    main()
