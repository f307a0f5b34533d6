"""`KVTPClient`: a worker that has KV tensors, and moves blocks when its manager says so."""

from __future__ import annotations

import logging
import multiprocessing.connection as mpc
import threading
import time
from collections.abc import Sequence
from typing import Any

import kvring
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.server import hub

CONNECT_SECONDS = 30.0


class KVTPClient:
    """One per rank, in the process that owns the tensors."""

    def __init__(
        self, gpu_register_port: str, dp_client_id: int, device_id: int, pp_rank: int = 0, intra_client_id: int = 0
    ) -> None:
        self._path = hub.path_of(gpu_register_port, dp_client_id)
        self.dp_client_id, self.device_id, self._rank = dp_client_id, device_id, intra_client_id
        self._connection: mpc.Connection | None = None
        self._agent: kvring.Agent | None = None
        self._threads: list[threading.Thread] = []
        self._sending = threading.Lock()

    def register_to_server(
        self, kv_caches: Sequence[Any], kv_layout: KVCacheLayout, *_more: Any, resume: bool = False, **_named: Any
    ) -> None:
        """Offers the tensors. The manager must have been started; waits for it 30 s at the most.

        Raises ValueError for tensors that cannot be cached, ConnectionError without a manager or server.
        """
        self.close()
        group = kvring.Group(_tensors(kv_caches, kv_layout))
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                self._connection = mpc.Client(self._path, "AF_UNIX")
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    text = f"{self._path}: no KVManager has been started for dp_client_id = {self.dp_client_id}"
                    raise ConnectionError(text) from None
                time.sleep(0.05)
        hub.bound(self._connection)
        hub.send(self._connection, {"rank": self._rank})
        answer = hub.receive(self._connection)
        if "refused" in answer:
            raise ConnectionError(f"{self._path}: {answer['refused']}")
        said = answer["you"]
        part = kvring.Memory([group])
        memory = kvring.Memory([group], offset_in_slot=said["index"] * part.block_bytes)
        block_bytes = -(-part.block_bytes * said["parts"] // 4096) * 4096
        layout = kvring.Layout(**said["layout"], kv_layout=f"{kv_layout.type.value} {part.describe()}",
                               block_bytes=block_bytes)  # fmt: skip
        settings = dict(said["settings"])
        for blocks, setting in (("cpu_blocks", "cpu_cache_gb"), ("ssd_blocks", "ssd_cache_gb")):
            if said.get(blocks) and setting not in kvring.load_config(**settings)[0]:
                settings[setting] = said[blocks] * block_bytes / 2**30
        self._stores = said["stores"]
        self._agent = kvring.Agent(layout, memory, rank=said["index"], token=said["token"], **settings)
        hub.send(self._connection, {"registered": self._rank})
        for work in (self._listen, self._report):
            thread = threading.Thread(target=work, name="kvring-flexkv", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _tell(self, connection: mpc.Connection, ticket: int, missed: list[int]) -> None:
        with self._sending:
            hub.send(connection, {"ticket": ticket, "missed": missed})

    def _listen(self) -> None:
        agent, connection = self._agent, self._connection
        try:
            while True:
                job = hub.receive(connection)
                keys = bytes.fromhex(job["keys"])
                try:
                    self._take(agent, connection, job, keys)
                except Exception:
                    # Whatever is wrong with this one is no reason to leave the others unanswered.
                    logging.getLogger("kvring.flexkv").exception("task %s was not taken", job["ticket"])
                    self._tell(connection, job["ticket"], list(range(len(keys) // kvring.KEY_BYTES)))
        except (OSError, EOFError, ValueError, TypeError):  # TypeError: closed by another thread
            pass
        finally:
            hub.hang_up(connection)

    def _take(self, agent: kvring.Agent, connection: mpc.Connection, job: hub.Message, keys: bytes) -> None:
        match job["do"]:
            case "load":
                agent.load(job["ticket"], tuple(job["lease"]), job["first"], keys, job["pages"])
            case "store" if self._stores:
                agent.store(job["ticket"], bytes.fromhex(job["parent"]), job["first"], keys, job["pages"])
            case "store":
                self._tell(connection, job["ticket"], [])
            case "cancel":
                agent.fence([job["ticket"]], 0)

    def _report(self) -> None:
        agent, connection = self._agent, self._connection
        try:
            while not connection.closed:
                if agent.wait(at_most_ms=200):
                    for ended in agent.poll():
                        self._tell(connection, ended.ticket, ended.missed)
        except (OSError, RuntimeError, TypeError, ValueError):
            hub.hang_up(connection)

    def suspend_gpu_mappings(self) -> int:
        """The tensors go away until `register_to_server(..., resume=True)`: nothing touches them after this."""
        count = int(self._agent is not None)
        self.close()
        return count

    def close(self) -> None:
        """Leaves the manager."""
        if self._agent:
            self._agent.close()
        if self._connection:
            hub.hang_up(self._connection)
            for thread in self._threads:
                thread.join(timeout=5)
            self._connection.close()
        self._agent = self._connection = None
        self._threads.clear()


class _View:
    """A tensor whose first dimension counts blocks, without copying it."""

    def __init__(self, tensor: Any, order: Sequence[int]) -> None:
        self._tensor = tensor
        self.device = getattr(tensor, "device", None)
        self.shape = [tensor.shape[dim] for dim in order]
        self._strides = [tensor.stride()[dim] for dim in order]

    def stride(self) -> list[int]:
        return self._strides

    def element_size(self) -> int:
        return self._tensor.element_size()

    def data_ptr(self) -> int:
        return self._tensor.data_ptr()


def _tensors(kv_caches: Sequence[Any], layout: KVCacheLayout) -> list[Any]:
    if not kv_caches:
        raise ValueError("kv_caches = []: at least one tensor is expected")
    views = []
    for tensor in kv_caches:
        device = getattr(getattr(tensor, "device", None), "type", "cpu")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"KV memory on {device}: kvring copies from and to CPU memory and CUDA devices")
        order = list(range(len(tensor.shape)))
        if layout.type == KVCacheLayoutType.LAYERFIRST and layout.kv_dim > 1:
            order = [1, 0, *order[2:]]
        view = _View(tensor, order)
        if view.shape[0] != layout.num_block:
            raise ValueError(
                f"shape = {list(tensor.shape)}: {layout.num_block} blocks are expected in {layout.type.value}"
            )
        views.append(view)
    return views
