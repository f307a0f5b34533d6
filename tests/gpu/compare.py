"""KV blocks to and from an accelerator: kvring beside PyTorch's index_select / index_copy_ with a staging tensor,
vLLM's own swap_blocks where vLLM is installed, and one plain copy of as many bytes, which none can beat.

    python compare.py --device cuda:0 [--output results.jsonl]
    python compare.py --device cpu                # only shows that it runs

All in one process over the same tensors, one after the other in each round (A B A B), medians over the rounds. What
each copies is compared first. On a CUDA device a bf16 matrix product is timed alone and beside each of them, too, and
beside kvring with each of its ways of copying for everything: the copy engine over pages as they are, staged, direct.
One JSON object a line, as soon as it is known. `kvring bench copy --device 0` has vLLM's loop and batch re-implemented
beside kvring's own ways, in compiled code.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import kvring

SHAPES = [
    ("64 KiB pages of 32 layers (8B TP1)", 32, 64 << 10),
    ("16 KiB pages of 80 layers (70B TP4)", 80, 16 << 10),
    ("8 KiB pages of 80 layers (70B TP8)", 80, 8 << 10),
    ("18 KiB pages of 61 layers (MLA)", 61, 18 << 10),
]
SIZE = 16
"""Tokens of a block."""


class World:
    """Tensors of an engine, a layer each: twice the pages that one copy has."""

    def __init__(self, device: torch.device, layers: int, page_bytes: int, size_mb: int) -> None:
        self.device = device
        self.layers, self.page_bytes = layers, page_bytes
        # A block is whole sectors.
        self.blocks = max(4, (size_mb << 20) // (layers * page_bytes))
        self.bytes = self.blocks * layers * page_bytes
        shape = (2 * self.blocks, page_bytes)
        self.kv = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(layers)]
        self._random = torch.Generator().manual_seed(1)

    def pages(self) -> list[int]:
        """Where an engine has the blocks of one request: anywhere."""
        return torch.randperm(2 * self.blocks, generator=self._random)[: self.blocks].tolist()

    def pinned(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def read(self, pages: list[int]) -> torch.Tensor:
        return torch.stack([layer[pages] for layer in self.kv]).cpu()

    def wipe(self) -> None:
        for layer in self.kv:
            layer.zero_()
        self.settle()


class Plain:
    """One copy of as many bytes between pinned memory and the device."""

    name = "one plain copy"

    def __init__(self, world: World) -> None:
        self.world = world
        self.host = world.pinned(world.bytes)
        self.there = torch.zeros(world.bytes, dtype=torch.uint8, device=world.device)

    def store(self, pages: list[int]) -> None:
        self.host.copy_(self.there, non_blocking=True)

    def load(self, pages: list[int]) -> None:
        self.there.copy_(self.host, non_blocking=True)

    def is_over(self) -> bool:
        return True


class Select(Plain):
    """index_select into a staging tensor and one copy; one copy and index_copy_."""

    name = "PyTorch index_select / index_copy_"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        shape = (world.layers, world.blocks, world.page_bytes)
        self.host, self.there = self.host.view(shape), self.there.view(shape)

    def _index(self, pages: list[int]) -> torch.Tensor:
        return torch.tensor(pages).to(self.world.device, non_blocking=True)

    def store(self, pages: list[int]) -> None:
        index = self._index(pages)
        for layer, staged in zip(self.world.kv, self.there, strict=True):
            torch.index_select(layer, 0, index, out=staged)
        self.host.copy_(self.there, non_blocking=True)

    def load(self, pages: list[int]) -> None:
        self.there.copy_(self.host, non_blocking=True)
        index = self._index(pages)
        for layer, staged in zip(self.world.kv, self.there, strict=True):
            layer.index_copy_(0, index, staged)


class Swap(Select):
    """vLLM's own swap_blocks, layer by layer."""

    name = "vLLM swap_blocks"

    def __init__(self, world: World) -> None:
        from vllm import _custom_ops

        if world.device.type != "cuda":
            raise ImportError("swap_blocks is for CUDA")
        super().__init__(world)
        self._swap = _custom_ops.swap_blocks
        takes_bytes = "block_size_in_bytes" in inspect.signature(self._swap).parameters
        self._more: tuple[int, ...] = (world.page_bytes,) if takes_bytes else ()

    def _all(self, pages: list[int], is_store: bool) -> None:
        pairs = [(page, slot) if is_store else (slot, page) for slot, page in enumerate(pages)]
        mapping = torch.tensor(pairs, dtype=torch.int64)
        for layer, host in zip(self.world.kv, self.host, strict=True):
            source, target = (layer, host) if is_store else (host, layer)
            self._swap(source, target, *self._more, mapping)

    def store(self, pages: list[int]) -> None:
        self._all(pages, True)

    def load(self, pages: list[int]) -> None:
        self._all(pages, False)


class Kvring:
    """Through the server: keys, leases, checksums and all."""

    WAYS = ("engine", "staged", "direct")

    def __init__(self, world: World, place: str, way: str | None = None) -> None:
        self.world = world
        self.name = f"kvring, {way}" if way else "kvring"
        # Short: a socket's path is.
        self._socket = f"{place}/{way or 's'}"
        memory = kvring.Memory([kvring.Group(world.kv)])
        layout = kvring.Layout(
            model="compare", dtype="uint8", tokens_per_block=SIZE, layers=world.layers, kv_heads=1,
            head_size=world.page_bytes // SIZE, kv_layout=memory.describe(),
            block_bytes=-(-memory.block_bytes // 4096) * 4096,
        )  # fmt: skip
        pool_gb = 4 * world.blocks * layout.block_bytes / (1 << 30) + 0.01
        settings: dict[str, Any] = {"server_recv_port": self._socket, "cpu_cache_gb": pool_gb, "ssd_cache_gb": 0}
        token = kvring.new_token()
        self._agent = kvring.Agent(
            layout, memory, token=token, instance_id=0, load_timeout_ms=30_000, copy_way=way, **settings
        )
        self._scheduler = kvring.Instance(token=token, instance_id=0, client_wait_ms=2000, **settings)
        self._tickets = itertools.count(1)
        self._chain: kvring.KeyChain | None = None
        self._watch: kvring.Watch | None = None
        self._lease: kvring.Lease | None = None
        for trouble in self._agent.trouble:
            print(f"kvring: {trouble}", file=sys.stderr)

    def store(self, pages: list[int]) -> None:
        # What is there is not stored again: other tokens each time.
        first = next(self._tickets)
        chain = kvring.KeyChain(kvring.namespace_root([("model", "compare")]), SIZE)
        chain.extend([first, *range(1, SIZE * len(pages))])
        self._chain = chain
        self._watch = self._agent.store(first, chain.before(0), 0, chain.keys, pages)

    def load(self, pages: list[int]) -> None:
        assert self._chain is not None, "something was stored"
        if self._lease:
            self._scheduler.release(self._lease)
        blocks, self._lease = self._scheduler.match(self._chain.keys)
        assert blocks == len(pages) and self._lease is not None, f"{blocks} of {len(pages)} blocks are there"
        self._watch = self._agent.load(next(self._tickets), self._lease, 0, self._chain.keys, pages)

    def is_over(self) -> bool:
        if self._watch is None or not self._watch.is_ended:
            return False
        self._agent.poll()
        assert not self._watch.has_missed, f"blocks are missing: {self._agent.trouble}"
        return True

    def close(self) -> None:
        self._agent.close()
        self._scheduler.close()
        # It outlives those who use it.
        server = kvring.server_program() or "kvring"
        subprocess.run([server, "stop", "--socket", self._socket], check=False, stdout=subprocess.DEVNULL)


def until_over(world: World, method: Any) -> None:
    while not method.is_over():
        time.sleep(0)
    world.settle()


def check(world: World, method: Any) -> None:
    """What was stored from some pages comes back into others."""
    pages, others = world.pages(), world.pages()
    before = world.read(pages)
    method.store(pages)
    until_over(world, method)
    world.wipe()
    method.load(others)
    until_over(world, method)
    if not isinstance(method, Plain) or isinstance(method, Select):
        assert torch.equal(before, world.read(others)), f"{method.name} copies wrong bytes"


def timed(world: World, method: Any, direction: str) -> float:
    """GB/s from the submission to the end as the engine sees it."""
    pages = world.pages()
    world.settle()
    began = time.perf_counter()
    getattr(method, direction)(pages)
    until_over(world, method)
    return world.bytes / (time.perf_counter() - began) / 1e9


def product(device: torch.device, seconds: float, beside: Callable[[], None]) -> float:
    """Matrix products a second on the compute stream, while something else goes on."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.matmul(a, b)
    torch.cuda.synchronize(device)
    ahead: list[torch.cuda.Event] = []
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        # A few ahead, as an engine is: never idle, never far.
        while len(ahead) < 4:
            torch.matmul(a, b)
            event = torch.cuda.Event()
            event.record()
            ahead.append(event)
        beside()
        while ahead and ahead[0].query():
            ahead.pop(0)
            count += 1
    torch.cuda.synchronize(device)
    return (count + len(ahead)) / (time.perf_counter() - began)


def interference(world: World, methods: list[Any], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """How much slower a matrix product is while loads follow one another."""
    side = torch.cuda.Stream(world.device)
    results = []
    for method in methods:
        alone, beside = [], []

        def go_on(method: Any = method) -> None:
            if method.is_over() and (isinstance(method, Kvring) or side.query()):
                # PyTorch's methods on a stream of their own; kvring has its own.
                with torch.cuda.stream(torch.cuda.current_stream() if isinstance(method, Kvring) else side):
                    method.load(world.pages())

        for _ in range(rounds):
            alone.append(product(world.device, seconds, lambda: None))
            method.load(world.pages())
            beside.append(product(world.device, seconds, go_on))
            until_over(world, method)
        slower = statistics.median(1 - with_it / without for with_it, without in zip(beside, alone, strict=True))
        results.append({"method": method.name, "products_s_alone": statistics.median(alone), "slower_by": slower})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="cuda:0, or cpu")
    parser.add_argument("--size-mb", type=int, default=256, help="of one copy")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement beside a matrix product")
    parser.add_argument("--output", help="JSON lines, instead of standard output")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    out = open(arguments.output, "w") if arguments.output else sys.stdout

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    tell(device=name, torch=torch.__version__, cuda=torch.version.cuda)
    for number, (shape, layers, page_bytes) in enumerate(SHAPES):
        print(f"[{number + 1}/{len(SHAPES)}] {shape}", file=sys.stderr)
        world = World(device, layers, page_bytes, arguments.size_mb)
        with tempfile.TemporaryDirectory() as place:
            ours = Kvring(world, place)
            methods: list[Any] = [Plain(world), Select(world), ours]
            try:
                methods.insert(2, Swap(world))
            except ImportError as why:
                tell(shape=shape, method=Swap.name, skipped=str(why))
            try:
                for method in methods:
                    check(world, method)
                rates: dict[tuple[str, str], list[float]] = {}
                for round_number in range(arguments.rounds + 1):
                    for method in methods:
                        for direction in ("store", "load"):
                            rate = timed(world, method, direction)
                            # The first round warms up.
                            if round_number:
                                rates.setdefault((method.name, direction), []).append(rate)
                for (method_name, direction), its in rates.items():
                    plain = rates[Plain.name, direction]
                    ratio = statistics.median(a / b for a, b in zip(its, plain, strict=True))
                    rate = statistics.median(its)
                    tell(shape=shape, method=method_name, direction=direction, gb_s=rate, of_plain=ratio)
                if device.type == "cuda":
                    for result in interference(world, methods, arguments.seconds, 3):
                        tell(shape=shape, **result)
                    for way in Kvring.WAYS:
                        forced = Kvring(world, place, way)
                        try:
                            check(world, forced)
                            for result in interference(world, [forced], arguments.seconds, 3):
                                tell(shape=shape, **result)
                        finally:
                            forced.close()
            finally:
                ours.close()


if __name__ == "__main__":
    main()
