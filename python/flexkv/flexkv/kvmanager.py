"""`KVManager`: FlexKV's calls, answered by kvring.

A task is a plan (`get_match`, `put_match`), then a launch, then an end that `wait` or `try_wait` tells
once. Unlike FlexKV's: no call waits without bound, a load that failed in part says which tokens came,
shutting one manager down harms nobody, and a namespace's parts cannot imitate one another.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import kvring
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.server.hub import Hub, Message, path_of

__all__ = ["KVManager", "KVResponse", "KVResponseStatus"]

logger = logging.getLogger("kvring.flexkv")

TASKS_MAX = 100_000
TASK_SECONDS = 1800.0
"""A plan that nobody launches, or an end that nobody asks for, is forgotten after this."""
SWEEP_SECONDS = 60.0


@dataclasses.dataclass
class _Task:
    is_get: bool
    tokens: int
    keys: kvring.KeyChain
    first: int
    """Blocks first..end are moved."""
    end: int
    made: float
    lease: kvring.Lease | None = None
    waits_for: set[int] | None = None
    """Ranks that have not said how it ended; None: not launched."""
    missed: set[int] = dataclasses.field(default_factory=set)
    status: KVResponseStatus | None = None
    batch: list[int] | None = None


class KVManager:
    """One per instance (and data-parallel rank), in its scheduler's process."""

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        dp_client_id: int = 0,
        server_recv_port: str = "",
        gpu_register_port: str = "",
        event_collector: Any = None,
    ) -> None:
        self.model_config, self.cache_config = model_config, cache_config
        self._size = int(cache_config.tokens_per_block)
        if model_config.model is None:
            logger.warning(
                "ModelConfig names no model: blocks are shared by every model of this shape on this server. "
                "Give ModelConfig(model=...) its name and revision"
            )
        self._settings: dict[str, Any] = {"server_recv_port": server_recv_port} if server_recv_port else {}
        said, notes = kvring.load_config(**self._settings)
        for note in notes:
            logger.warning("%s", note)
        if "instance_id" not in said:
            self._settings["instance_id"] = dp_client_id
            self._settings["instance_num"] = max(int(said.get("instance_num", 1)), dp_client_id + 1)
        for field in ("ssd_cache_dir", "eviction_policy"):
            value = getattr(cache_config, field, None)
            if value and field not in said:
                self._settings[field] = ";".join(value) if isinstance(value, list) else value
        self.server_recv_port = said["server_recv_port"]
        self.gpu_register_port = gpu_register_port or f"{self.server_recv_port}_gpu_register"
        self._token = kvring.new_token()
        self._path = path_of(self.gpu_register_port, dp_client_id)
        self._tp = 1 if getattr(model_config, "use_mla", False) else int(model_config.tp_size)
        self._ranks = set(range(int(model_config.tp_size) * int(model_config.pp_size)))
        self._ids = itertools.count(dp_client_id * 10_000_000 + 1)
        self._tasks: dict[int, _Task] = {}
        self._changed = threading.Condition(threading.RLock())
        self._next_sweep = 0.0
        self._hub: Hub | None = None
        self._instance: kvring.Instance | None = None

    # Life.

    def start(self) -> None:
        """Listens for this instance's workers. Returns at once: `is_ready` says when they are there."""
        self._hub = Hub(self._path, self._worker_words(), self._heard)
        self._instance = kvring.Instance(token=self._token, **{**self._settings, "start_wait_ms": 1})

    def _identity(self) -> dict[str, Any]:
        model = self.model_config
        return {
            "model": str(model.model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokens_per_block": self._size,
            "layers": int(model.num_layers),
            "kv_heads": int(model.num_kv_heads),
            "head_size": int(model.head_size),
            "tp_size": self._tp * int(model.pp_size),
            "pp_size": int(model.pp_size),
        }

    def _worker_words(self) -> Any:
        cache = self.cache_config

        def words(rank: int) -> dict[str, Any]:
            tp = int(self.model_config.tp_size)
            index = rank // tp * self._tp + (rank % tp if self._tp > 1 else 0)
            return {
                "token": self._token,
                "settings": self._settings,
                "layout": self._identity(),
                "index": index,
                "parts": self._tp * int(self.model_config.pp_size),
                "stores": self._tp > 1 or rank % tp == 0,
                "cpu_blocks": cache.num_cpu_blocks,
                "ssd_blocks": cache.num_ssd_blocks if cache.enable_ssd else None,
            }

        return words

    def is_ready(self) -> bool:
        """Whether every worker of this instance is there and the server too. Waits for nothing."""
        return bool(self._hub and self._instance and self._hub.ranks() >= self._ranks and self._instance.is_connected)

    def shutdown(self) -> None:
        """Leaves. The server and the other instances go on."""
        if self._hub:
            self._hub.close()
            self._hub = None
        with self._changed:
            for task in self._tasks.values():
                if task.waits_for:
                    task.waits_for, task.status = set(), KVResponseStatus.FAILED
                    task.missed = set(range(task.end - task.first))
            self._changed.notify_all()
        if self._instance:
            self._instance.close()
            self._instance = None

    # Plans.

    def _chain(self, token_ids: Any, namespace: Sequence[str] | None) -> tuple[kvring.KeyChain, int]:
        tokens = np.asarray(token_ids, dtype=np.int64).ravel()
        parts = [("model", json.dumps(self._identity(), sort_keys=True))]
        # As one part: where one name ends and the next begins is part of what is hashed.
        parts += [("tenant", json.dumps(list(namespace)))] if namespace else []
        chain = kvring.KeyChain(kvring.namespace_root(parts), self._size)
        chain.extend(tokens.tolist())
        return chain, len(tokens)

    def _prefix(self, token_mask: Any, tokens: int) -> int:
        """Blocks at the start that the caller has already: those before the mask's first True."""
        if token_mask is None:
            return 0
        mask = np.asarray(token_mask, dtype=bool).ravel()
        if len(mask) != tokens:
            raise ValueError(f"token_mask has {len(mask)} entries for {tokens} tokens")
        return (int(np.argmax(mask)) if mask.any() else tokens) // self._size

    def _plan(self, is_get: bool, chain: kvring.KeyChain, tokens: int, first: int, end: int) -> int:
        task_id, now = next(self._ids), time.monotonic()
        with self._changed:
            if len(self._tasks) >= TASKS_MAX or now > self._next_sweep:
                self._next_sweep = now + SWEEP_SECONDS
                abandoned = [i for i, t in self._tasks.items() if not t.waits_for and now - t.made > TASK_SECONDS]
                for old in abandoned:
                    self._forget(old)
            self._tasks[task_id] = _Task(is_get, tokens, chain, first, max(first, end), now)
        return task_id

    def _mask(self, task: _Task, first: int, end: int) -> np.ndarray:
        mask = np.zeros(task.tokens, dtype=bool)
        mask[first * self._size : end * self._size] = True
        return mask

    def get_match(
        self,
        token_ids: Any,
        token_mask: Any = None,
        cpu_only: bool = False,
        namespace: Sequence[str] | None = None,
        swa_aware: bool = False,
    ) -> tuple[int, np.ndarray]:
        """Plans a load: (task, mask of the tokens that can be loaded). Launch or cancel it."""
        chain, tokens = self._chain(token_ids, namespace)
        first = self._prefix(token_mask, tokens)
        blocks, lease = self._instance.match(chain.keys) if self._instance and len(chain) else (0, None)
        task_id = self._plan(True, chain, tokens, first, blocks)
        task = self._tasks[task_id]
        if task.end > first:
            task.lease = lease
            self._instance.prefetch(lease, first, blocks - first)
        elif lease:
            self._instance.release(lease)
        return task_id, self._mask(task, task.first, task.end)

    def put_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Sequence[str] | None = None
    ) -> tuple[int, np.ndarray]:
        """Plans a store: (task, mask of the tokens that are not resident). Launch or cancel it."""
        chain, tokens = self._chain(token_ids, namespace)
        first = self._prefix(token_mask, tokens)
        blocks, lease = self._instance.match(chain.keys) if self._instance and len(chain) else (0, None)
        if lease:
            self._instance.release(lease)
        task_id = self._plan(False, chain, tokens, max(first, blocks), len(chain))
        task = self._tasks[task_id]
        return task_id, self._mask(task, task.first, task.end)

    def get_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Sequence[str] | None = None
    ) -> int:
        """`get_match` and `launch` in one."""
        task_id, mask = self.get_match(token_ids, token_mask, namespace=namespace)
        return self._launch_masked(task_id, mask, slot_mapping, token_mask)

    def put_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Sequence[str] | None = None
    ) -> int:
        """`put_match` and `launch` in one."""
        task_id, mask = self.put_match(token_ids, token_mask, namespace)
        return self._launch_masked(task_id, mask, slot_mapping, token_mask)

    def _launch_masked(self, task_id: int, mask: np.ndarray, slot_mapping: Any, token_mask: Any) -> int:
        slots = np.asarray(slot_mapping).ravel()
        if len(slots) != len(mask):
            # One slot for each token of the caller's mask: those before it have none.
            whole = np.zeros(len(mask), dtype=slots.dtype)
            start = 0 if token_mask is None else int(np.argmax(np.asarray(token_mask, dtype=bool)))
            whole[start : start + len(slots)] = slots[: len(mask) - start]
            slots = whole
        self.launch(task_id, slots[mask])
        return task_id

    def prefetch_async(self, token_ids: Any, namespace: Sequence[str] | None = None, swa_aware: bool = False) -> int:
        """Has the resident prefix read from the SSD into the pool. It ends at once; its mask says how far."""
        task_id, _mask = self.get_match(token_ids, namespace=namespace)
        with self._changed:
            task = self._tasks[task_id]
            task.status = KVResponseStatus.SUCCESS
            # What is being read is in use until it is there; then it may be evicted like any other.
            self._release(task)
        return task_id

    # Transfers.

    def launch(
        self,
        task_ids: int | Sequence[int],
        slot_mappings: Any,
        swa_slot_mappings: Any = None,
        as_batch: bool = False,
        layerwise_transfer: bool = False,
        counter_id: int = 0,
    ) -> list[int]:
        """Starts planned tasks; a slot of `slot_mappings` is block × tokens_per_block + offset, one for each
        token of the plan's mask. Says what to wait for: the tasks, or with `as_batch` their batch."""
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        mappings = slot_mappings if isinstance(slot_mappings, (list, tuple)) else [slot_mappings]
        if len(mappings) != len(ids):
            raise ValueError(f"{len(mappings)} slot_mappings for {len(ids)} tasks")
        for task_id, mapping in zip(ids, mappings):
            self._launch(task_id, np.asarray(mapping).ravel())
        if not as_batch:
            return ids
        batch = next(self._ids)
        with self._changed:
            now = time.monotonic()
            self._tasks[batch] = _Task(True, 0, kvring.KeyChain(b"\0" * 16, self._size), 0, 0, now, batch=ids)
        return [batch]

    def _launch(self, task_id: int, slots: np.ndarray) -> None:
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None or task.waits_for is not None or task.status is not None:
                return
            blocks = task.end - task.first
            if len(slots) < blocks * self._size:
                raise ValueError(
                    f"slot_mapping of task {task_id} has {len(slots)} entries: {blocks * self._size} are expected"
                )
            task.waits_for = set(self._ranks)
        if not blocks:
            return self._ended(task_id)
        message: Message = {
            "do": "load" if task.is_get else "store",
            "ticket": task_id,
            "first": task.first,
            "keys": task.keys.slice(task.first, task.end).hex(),
            "pages": (slots[: blocks * self._size : self._size] // self._size).tolist(),
        }
        if task.is_get:
            message["lease"] = [task.lease.id, task.lease.expires_at_ns]
        else:
            message["parent"] = task.keys.before(task.first).hex()
        told = self._hub.tell(message) if self._hub else set()
        for rank in self._ranks - told:
            self._heard_of(rank, task_id, range(blocks))

    def _heard(self, rank: int, message: Message | None) -> None:
        if message is None:
            # The worker is gone, and with it what it had under way.
            with self._changed:
                lost = [(i, t.end - t.first) for i, t in self._tasks.items() if t.waits_for and rank in t.waits_for]
            for task_id, blocks in lost:
                self._heard_of(rank, task_id, range(blocks))
        else:
            self._heard_of(rank, message["ticket"], message["missed"])

    def _heard_of(self, rank: int, task_id: int, missed: Sequence[int]) -> None:
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None or task.waits_for is None:
                return
            task.missed.update(missed)
            task.waits_for.discard(rank)
            if not task.waits_for:
                self._ended(task_id)

    def _ended(self, task_id: int) -> None:
        with self._changed:
            task = self._tasks[task_id]
            if task.status is None:
                # A load that is not whole has failed; a store that is not whole has stored less.
                failed = task.missed and task.is_get
                task.status = KVResponseStatus.FAILED if failed else KVResponseStatus.SUCCESS
            self._release(task)
            self._changed.notify_all()

    def _release(self, task: _Task) -> None:
        if task.lease and self._instance:
            self._instance.release(task.lease)
        task.lease = None

    def _forget(self, task_id: int) -> None:
        self._release(self._tasks.pop(task_id))

    def cancel(self, task_ids: int | Sequence[int]) -> None:
        """A plan is forgotten; a store under way is told to stop, a load under way ends by itself: what was
        launched still has an end to wait for, and its slots are in use until then."""
        for task_id in [task_ids] if isinstance(task_ids, int) else task_ids:
            with self._changed:
                task = self._tasks.get(task_id)
                if task is None:
                    continue
                if task.waits_for is None:
                    self._forget(task_id)
                    continue
            if not task.is_get and self._hub:
                self._hub.tell({"do": "cancel", "ticket": task_id, "keys": ""})

    # Ends.

    def _response(self, task_id: int) -> KVResponse | None:
        """A task's end, told once; None while it is under way."""
        task = self._tasks.get(task_id)
        if task is None:
            return KVResponse(KVResponseStatus.NOTFOUND, task_id, None)
        if task.batch is not None:
            if any((of := self._tasks.get(i)) is not None and of.status is None for i in task.batch):
                return None
            responses = [self._response(i) for i in task.batch]
            del self._tasks[task_id]
            bad = [r.status for r in responses if r.status != KVResponseStatus.SUCCESS]
            masks = [r.return_mask for r in responses]
            return KVResponse(bad[0] if bad else KVResponseStatus.SUCCESS, task_id, masks)
        if task.status is None:
            return None if task.waits_for is not None else KVResponse(KVResponseStatus.UNREADY, task_id, None)
        came = min(task.missed, default=task.end - task.first)
        mask = self._mask(task, task.first, task.first + came)
        self._forget(task_id)
        return KVResponse(task.status, task_id, mask)

    def try_wait(self, task_ids: int | Sequence[int]) -> dict[int, KVResponse]:
        """The tasks of these that have ended."""
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        with self._changed:
            told = {task_id: self._response(task_id) for task_id in ids}
        ended = {task_id: r for task_id, r in told.items() if r and r.status != KVResponseStatus.UNREADY}
        return ended

    def wait(
        self, task_ids: int | Sequence[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """The end of each task: TIMEOUT for those that go on, UNREADY for those never launched."""
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        deadline = time.monotonic() + timeout
        ended: dict[int, KVResponse] = {}
        with self._changed:
            while True:
                for task_id in ids:
                    if task_id not in ended and (response := self._response(task_id)):
                        ended[task_id] = response
                left = deadline - time.monotonic()
                if len(ended) == len(set(ids)) or left <= 0:
                    break
                self._changed.wait(left)
        for task_id in ids:
            ended.setdefault(task_id, KVResponse(KVResponseStatus.TIMEOUT, task_id, None))
        return ended

    def reset(self) -> None:
        """Forgets every block of the server, for every instance. Raises ConnectionError where it could not."""
        if self._instance:
            self._instance.reset()
