"""kvring: one KV cache for every inference instance on a machine.

An inference instance is one scheduler and its workers. The scheduler opens an `Instance`: it matches
chains of block keys and gets a lease on what is resident. Each worker opens an `Agent` over its KV
tensors: it loads leased blocks into them and stores new ones, on a thread of its own, without the GIL.

    memory = Memory([Group(tensors)])                    # a tensor a layer; dimension 0 counts pages
    layout = Layout(model="m", dtype="bfloat16", tokens_per_block=16, layers=32, kv_heads=8,
                    head_size=128, kv_layout=memory.describe(), block_bytes=memory.block_bytes)
    token = new_token()                                  # shared by the processes of one instance
    agent = Agent(layout, memory, token=token)           # in a worker; starts the server if there is none
    scheduler = Instance(token=token)                    # in the scheduler; with the same settings

    chain = KeyChain(namespace_root([("model", "m")]), tokens_per_block=16)
    chain.extend(tokens)                                 # keys of the full blocks
    blocks, lease = scheduler.match(chain.keys)
    if lease:                                            # blocks 0..blocks, into pages 0..blocks
        agent.load(1, lease, first=0, keys=chain.slice(0, blocks), pages=list(range(blocks)))
    missing = chain.slice(blocks, len(chain))            # after they have been computed into their pages
    agent.store(2, chain.before(blocks), blocks, missing, pages=list(range(blocks, len(chain))))
    while agent.wait(at_most_ms=100):
        for ended in agent.poll():                       # in the order in which they ended
            print(ended.ticket, ended.missed)
    if lease:
        scheduler.release(lease)                         # after its loads have ended

`first` is the depth of the first key in its chain; a load whose keys are not those of the lease at that
depth misses. Opening raises ConnectionError where a server refuses and ValueError for a wrong setting or
wrong arguments. No later call raises because a server is gone or slow: a match is then (0, None), a load
ends with the blocks that did not come, a store is dropped, and a thread behind connects again; `trouble`
says why. Settings come from keyword
arguments, `KVRING_*`, `FLEXKV_*` or a file, as docs/CONFIG.md lists them; a wrong one raises ValueError
with its name, its value and the remedy.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvring import _native
from kvring._native import Lease, Watch, namespace_id, namespace_root, next_keys

__all__ = [
    "KEY_BYTES",
    "NO_PAGE",
    "Agent",
    "Ended",
    "Group",
    "Instance",
    "KeyChain",
    "Layout",
    "Lease",
    "Memory",
    "Watch",
    "load_config",
    "namespace_id",
    "namespace_root",
    "new_token",
    "next_keys",
    "server_program",
]
__version__ = _native.__version__

KEY_BYTES = 16
"""Bytes of one block key."""
NO_PAGE = 0xFFFF_FFFF
"""A page that is not there: its part of a slot is left alone."""


def new_token() -> str:
    """A random token: the processes of one instance share it, and it proves that a lease is theirs."""
    return secrets.token_hex(16)


def server_program() -> str | None:
    """The `kvring` program that was installed with this module, else one in PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "kvring"
    return str(beside) if beside.is_file() else shutil.which("kvring")


def load_config(**settings: Any) -> tuple[dict[str, str], list[str]]:
    """What an operator said, by argument, file and environment, and notes on FlexKV settings that do not apply."""
    return _native.load_config(_said(settings))


def _said(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "1" if value else "0"
        return str(value)

    said = [(name, text(value)) for name, value in settings.items() if value is not None]
    if "server_bin" not in settings and "server_bin" not in _native.load_config(said)[0]:
        program = server_program()
        if program:
            said.append(("server_bin", program))
    return said


@dataclasses.dataclass(frozen=True)
class Layout:
    """What instances must agree on to share blocks; a server refuses the rest, naming each difference."""

    model: str
    dtype: str
    tokens_per_block: int
    layers: int
    kv_heads: int
    head_size: int
    kv_layout: str
    block_bytes: int
    """Bytes of one block over all layers and ranks: a multiple of 4,096."""
    tp_size: int = 1
    """Ranks that hold different parts of a block, at most 32."""
    pp_size: int = 1

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "key_contract": _native.KEY_CONTRACT_VERSION})


class _Array:
    """A numpy array, seen as a tensor."""

    def __init__(self, array: Any) -> None:
        if not array.flags.writeable:
            raise ValueError("a read-only array cannot be loaded into")
        self._array = array
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self._array.itemsize for stride in self._array.strides)

    def element_size(self) -> int:
        return self._array.itemsize


def _device_of(tensor: Any) -> int | None:
    device = getattr(tensor, "device", None)
    kind = getattr(device, "type", "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"KV memory on {kind}: kvring copies from and to CPU memory and CUDA devices")
    return (getattr(device, "index", None) or 0) if kind == "cuda" else None


def _as_tensor(tensor: Any) -> Any:
    if hasattr(tensor, "data_ptr"):
        return tensor
    if hasattr(tensor, "__array_interface__"):
        return _Array(tensor)
    if hasattr(tensor, "__dlpack__"):
        import numpy

        return _Array(numpy.from_dlpack(tensor))
    raise ValueError(f"a {type(tensor).__name__} has neither data_ptr(), nor an array interface, nor DLPack")


@dataclasses.dataclass
class Group:
    """KV tensors that share a block table. Dimension 0 counts pages; the others are one page.

    A tensor is anything with `data_ptr()`, `shape`, `stride()` and `element_size()`, as torch's have, a
    numpy array, or an object of host memory that speaks DLPack (for which numpy is needed).
    With `rows_per_page` above 1, that many neighbours in dimension 0 are one page.
    """

    tensors: Sequence[Any]
    pages_per_block: int = 1
    rows_per_page: int = 1

    def __post_init__(self) -> None:
        self.tensors = [_as_tensor(tensor) for tensor in self.tensors]

    def to_map(self) -> dict[str, Any]:
        return {"pages_per_block": self.pages_per_block, "tensors": [self._tensor(t) for t in self.tensors]}

    def _tensor(self, tensor: Any) -> dict[str, Any]:
        element = tensor.element_size()
        dims = [(n, s * element) for n, s in zip(tensor.shape, tensor.stride())]
        if not dims or dims[0][0] % self.rows_per_page:
            shape = list(tensor.shape)
            raise ValueError(f"shape = {shape}: dimension 0 must be a multiple of rows_per_page = {self.rows_per_page}")
        if any(stride < 0 for _, stride in dims):
            raise ValueError(f"strides = {tensor.stride()}: a tensor that runs backwards cannot be cached")
        rows, row_stride = dims[0]
        page = [(self.rows_per_page, row_stride)] if self.rows_per_page > 1 else []
        page += [dims[i] for i in self.order(tensor)]
        return {
            "address": tensor.data_ptr(),
            "bytes": sum((n - 1) * stride for n, stride in dims) + element,
            "pages_count": rows // self.rows_per_page,
            "page_stride_bytes": row_stride * self.rows_per_page,
            "shape": [n for n, _ in page],
            "strides_bytes": [stride for _, stride in page],
            "element_bytes": element,
        }

    @staticmethod
    def order(tensor: Any) -> list[int]:
        """The dimensions of a page as they lie in memory, outermost first: a slot holds them in this order."""
        strides = tensor.stride()
        return sorted(range(1, len(strides)), key=lambda dim: -strides[dim])

    def describe(self) -> str:
        """How a page lies, for a layout: equal for groups whose bytes mean the same."""

        def page(tensor: Any) -> str:
            dims = "x".join(f"{dim}:{tensor.shape[dim]}" for dim in self.order(tensor))
            return f"{self.rows_per_page}[{dims}]{tensor.element_size()}"

        kinds = [page(tensor) for tensor in self.tensors]
        runs: list[tuple[str, int]] = []
        for kind in kinds:
            count = runs.pop()[1] if runs and runs[-1][0] == kind else 0
            runs.append((kind, count + 1))
        return f"{self.pages_per_block}*({','.join(f'{count}*{kind}' for kind, count in runs)})"


@dataclasses.dataclass
class Memory:
    """A rank's KV memory: its groups, in the order in which they lie in a slot."""

    groups: Sequence[Group]
    offset_in_slot: int = 0
    """Where this rank's part of a slot begins."""
    device: int | None = None
    """The CUDA device whose memory it is, as torch numbers them; None for the processor's. Tensors of torch know."""

    def __post_init__(self) -> None:
        devices = {_device_of(tensor) for group in self.groups for tensor in group.tensors}
        devices -= {None} if self.device is not None else set()
        if len(devices | ({self.device} if self.device is not None else set())) > 1:
            raise ValueError(f"KV tensors on several devices: {sorted(map(str, devices))}")
        if self.device is None and devices:
            self.device = devices.pop()

    @property
    def pages_per_block(self) -> int:
        return sum(group.pages_per_block for group in self.groups)

    @property
    def block_bytes(self) -> int:
        """Bytes of this rank's part of a block."""
        total = 0
        for group in self.groups:
            for tensor in group.to_map()["tensors"]:
                bytes_of_page = tensor["element_bytes"]
                for n in tensor["shape"]:
                    bytes_of_page *= n
                total += bytes_of_page * group.pages_per_block
        return total

    def describe(self) -> str:
        """How a rank's part of a block lies, for a layout's `kv_layout`."""
        return "+".join(group.describe() for group in self.groups)

    def to_json(self) -> str:
        return json.dumps({"offset_in_slot": self.offset_in_slot, "groups": [g.to_map() for g in self.groups]})


class KeyChain:
    """Keys of a growing sequence of tokens. Only full blocks have one."""

    def __init__(self, root: bytes, tokens_per_block: int) -> None:
        self._root = root
        self._tokens_per_block = tokens_per_block
        self.keys = b""

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES

    def extend(self, tokens: Sequence[int], extras: Mapping[int, Sequence[bytes]] | None = None) -> None:
        """Appends the full blocks of `tokens`, which follow those already there.

        `extras` holds, for the index of a block in `tokens`, what else its bytes depend on.
        """
        parent = self.keys[-KEY_BYTES:] or self._root
        self.keys += next_keys(parent, tokens, self._tokens_per_block, extras)

    def key(self, depth: int) -> bytes:
        """The key of one block."""
        return self.keys[depth * KEY_BYTES : (depth + 1) * KEY_BYTES]

    def slice(self, first: int, end: int) -> bytes:
        """The keys of blocks first..end."""
        return self.keys[first * KEY_BYTES : end * KEY_BYTES]

    def parent(self, depth: int) -> bytes:
        """The key of the block before, empty at depth 0."""
        return self.key(depth - 1) if depth else b""

    def before(self, depth: int) -> bytes:
        """What a store from this depth on names as its parent: the block before; at depth 0 the namespace, so that it
        can be counted and forgotten by itself."""
        return self.key(depth - 1) if depth else namespace_id(self._root)


class Instance:
    """What an instance's scheduler holds. A call waits `client_wait_ms` at the most, and a server that is gone
    is a miss; only opening one that refuses, and `reset`, raise ConnectionError.

    Without a layout it can match, not load or store; with one it may start the server.
    """

    def __init__(self, *, token: str | None = None, layout: Layout | None = None, **settings: Any) -> None:
        text = layout.to_json() if layout else None
        self._native = _native.Instance(_said(settings), token, text)

    def match(self, keys: bytes) -> tuple[int, Lease | None]:
        """The longest resident prefix of a chain (at most 8,192 blocks), and the lease on it."""
        return self._native.match(keys)

    def release(self, lease: Lease) -> None:
        """Ends a lease. Does not wait."""
        self._native.release(lease)

    def prefetch(self, lease: Lease, first: int, count: int) -> None:
        """Has leased blocks read from the SSD into the pool ahead of a load. Does not wait."""
        self._native.prefetch(lease, first, count)

    def events(self, limit: int = 4096) -> tuple[list[tuple[bool, bytes]], bool]:
        """What became resident (True, key) or is gone (False, key) since the last call, whoever did it.

        The second value says that some were lost: this reader was more than 65,536 behind, or the server
        was started anew. Reads shared memory; does not wait.
        """
        return self._native.events(limit)

    def reset(self) -> int:
        """Forgets every block of the server, for every instance; says how many. Waits at most 8 s.

        Raises ConnectionError without a server, and where a restart may still find blocks on the SSD.
        """
        return self._native.reset()

    @property
    def trouble(self) -> list[str]:
        """What an operator should know: why there is no server, or which settings the one there does not have."""
        return self._native.trouble

    @property
    def is_connected(self) -> bool:
        """Whether a server is attached now."""
        return self._native.is_connected

    @property
    def sessions_count(self) -> int:
        """How many sessions it has had: above 1 after a server was lost and found."""
        return self._native.sessions_count

    @property
    def refusal(self) -> str | None:
        """Why the server refused to take this instance back."""
        return self._native.refusal

    def close(self) -> None:
        """Leaves the server; its leases end."""
        self._native.close()


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a ticket ended."""

    ticket: int
    is_load: bool
    missed: list[int]
    """Load: indices of blocks that did not come; compute them. Store: of blocks that are not resident after it."""
    seconds: float


class Agent:
    """What an instance's worker holds: a thread that copies between the pool and KV tensors.

    `load` and `store` return at once; their end is found by `poll`, or by the Watch they return. Pages of a load
    must be left alone until it has ended, pages of a store must not be written until it has ended or `fence` has
    returned. On a CUDA device, copies wait for what was submitted to `stream` before: by default torch's current
    stream, so call them where the engine submits its work. Raises OSError where there is no CUDA driver for
    memory on a device, with the remedy. `copy_way` is for benchmarks: "engine", "staged" or "direct" for every copy
    of a device, instead of what is measured to be the fastest at the start.
    """

    def __init__(
        self,
        layout: Layout,
        memory: Memory,
        *,
        rank: int = 0,
        token: str | None = None,
        load_timeout_ms: int = 2000,
        store_timeout_ms: int = 2000,
        copy_way: str | None = None,
        **settings: Any,
    ) -> None:
        self._device = memory.device
        tensors = [tensor for group in memory.groups for tensor in group.tensors]
        text = memory.to_json()
        timeouts = load_timeout_ms, store_timeout_ms
        self._native = _native.Agent(
            _said(settings), layout.to_json(), text, tensors, rank, token, *timeouts, memory.device, copy_way
        )

    def _stream(self, stream: int | None) -> int | None:
        if self._device is None or stream is not None:
            return stream
        torch = sys.modules.get("torch")
        if torch is None:
            raise ValueError("stream = None: without torch, say which stream of the device the copy has to wait for")
        return torch.cuda.current_stream(self._device).cuda_stream

    def load(
        self,
        ticket: int,
        lease: Lease | tuple[int, int],
        first: int,
        keys: bytes,
        pages: Sequence[int],
        *,
        epoch: int | None = None,
        stream: int | None = None,
        layer_groups: int = 1,
    ) -> Watch:
        """Brings leased blocks, the first at depth `first`, into `pages`: those of each block one after the other.

        `lease` is a Lease, or its (id, expires_at_ns) from another process of the instance. With `layer_groups`
        above 1 the first layers of all blocks come before the next of any, and `Watch.groups_done` tells how many
        groups are there; it stops short where a block is missing. `epoch` is what `epoch` said when the pages were
        chosen: pages of another one raise ValueError.
        """
        lease_id, expires_at_ns = (lease.id, lease.expires_at_ns) if isinstance(lease, Lease) else lease
        return self._native.load(
            ticket, lease_id, expires_at_ns, first, keys, pages, epoch, self._stream(stream), layer_groups
        )

    def store(
        self,
        ticket: int,
        parent: bytes,
        first: int,
        keys: bytes,
        pages: Sequence[int],
        *,
        epoch: int | None = None,
        stream: int | None = None,
    ) -> Watch:
        """Stores blocks, the first at depth `first` after the block `parent`: `KeyChain.before(first)`."""
        return self._native.store(ticket, parent, first, keys, pages, epoch, self._stream(stream))

    def cancel(self, tickets: Iterable[int]) -> None:
        """Makes these tickets end soon: what is not in flight is missed, or not stored. Does not wait."""
        self._native.cancel(list(tickets))

    @property
    def epoch(self) -> int:
        """Which epoch the memory is in: it changes with each `suspend`."""
        return self._native.epoch

    def suspend(self, patience_ms: int = 10_000) -> bool:
        """Before the tensors go: ends every ticket and lets go of the memory; the session stays. False: copies are
        still in flight after that time, and the memory must not go."""
        return self._native.suspend(patience_ms)

    def resume(self, memory: Memory) -> int:
        """After they have come back, perhaps elsewhere; says the new epoch."""
        tensors = [tensor for group in memory.groups for tensor in group.tensors]
        return self._native.resume(memory.to_json(), tensors)

    def poll(self) -> list[Ended]:
        """Tickets that have ended since the last call."""
        return [Ended(*ended) for ended in self._native.poll()]

    def wait(self, at_most_ms: int) -> bool:
        """Waits until a ticket has ended. Whether `poll` has something."""
        return self._native.wait(at_most_ms)

    def fence(self, tickets: Iterable[int], patience_ms: int) -> bool:
        """Waits until these stores read no page any more; stops those that take longer. Whether all were copied.

        What a stuck device reads more than a second after that is stored nowhere.
        """
        return self._native.fence(list(tickets), patience_ms)

    @property
    def trouble(self) -> list[str]:
        """What an operator should know: why there is no server, or which settings the one there does not have."""
        return self._native.trouble

    @property
    def is_connected(self) -> bool:
        """Whether a server is attached now."""
        return self._native.is_connected

    def counters(self) -> dict[str, int]:
        """Blocks since the start, by what became of them, and sessions."""
        return self._native.counters()

    def close(self) -> bool:
        """Ends every ticket, and `poll` tells how. True: the tensors are not touched after this. False: a device still
        copies, and they are kept until the process ends."""
        return self._native.close()
