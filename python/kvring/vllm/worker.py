"""A worker's side: hands tickets to the transfer agent, tells vLLM of their end."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

import kvring
from kvring.vllm.geometry import Geometry, Part, Unsupported, instance, layout, memory
from kvring.vllm.metadata import LoadSpec, StepMetadata, StoreSpec, WorkerMetadata

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.kvring")

SUSPEND_MS = 30_000
"""How long memory that is to go to sleep waits for copies in flight: a device that takes longer is stuck."""
FENCE_MS = 50
"""How long a step may wait for copies that have to end before its pages change hands."""


class WorkerSide:
    """One per rank, in vLLM's worker."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None, saves_end_with_step: bool = False
    ) -> None:
        self._vllm_config = vllm_config
        # A wrong setting is said now, not when the engine has come up.
        instance(vllm_config)
        self._kv_cache_config = kv_cache_config
        self._saves_end_with_step = saves_end_with_step
        self._agent: kvring.Agent | None = None
        self._stores = False
        self._by_request = False
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._fence_ms = FENCE_MS
        self._memory_again: Callable[[], kvring.Memory] | None = None
        self.problem: str | None = "KV tensors have not been registered"
        self._told: str | None = None
        self._loads: dict[int, LoadSpec] = {}
        self._refused: list[int] = []
        self._last: list[kvring.Ended] = []
        self._storing: dict[str, set[int]] = collections.defaultdict(set)
        self._of_ticket: dict[int, str] = {}
        self._ended: dict[int, int] = {}
        self._retained: set[str] = set()
        self._failed_pages: set[int] = set()
        self._failed_requests: set[str] = set()
        self._seconds = {"load": [0, 0.0], "store": [0, 0.0]}
        self._counted: dict[str, int] = {}

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Opens the agent over vLLM's KV tensors, and starts the server if that is ours to do."""
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        self.close()
        self._kv_caches = kv_caches
        token, settings, own = instance(self._vllm_config)
        self._fence_ms = int(own.get("fence_ms", FENCE_MS))
        waits: dict[str, Any] = {
            name: int(own[name]) for name in ("load_timeout_ms", "store_timeout_ms") if name in own
        }
        try:
            geometry = Geometry.of(self._vllm_config, self._kv_cache_config)
            part = Part.of(self._vllm_config, get_tensor_model_parallel_rank(), get_pp_group().rank_in_group)
            of_rank = memory(kv_caches, self._kv_cache_config, geometry, part)
            self._memory_again = lambda: memory(kv_caches, self._kv_cache_config, geometry, part)
            what = layout(self._vllm_config, geometry, of_rank, part)
            self._agent = kvring.Agent(what, of_rank, rank=part.index, token=token, **waits, **settings)
            self._stores = part.stores
            # vLLM mends single blocks only where every block's past is still there.
            self._by_request = len(geometry.pages_per_block) > 1 or geometry.is_windowed
            self._saves_end_with_step |= geometry.is_windowed
            self.problem = None
            for trouble in self._agent.trouble:
                logger.warning("kvring: %s", trouble)
            if not self._agent.is_connected:
                logger.warning("kvring: no server yet: everything is computed until there is one")
            logger.info("kvring: blocks of %d tokens, %d bytes; %s", what.tokens_per_block, what.block_bytes, what)
        except Unsupported as reason:
            self.problem = str(reason)
            logger.warning("kvring does not cache this model: %s", reason)
        except (ConnectionError, ValueError, OSError) as refusal:
            # A server that refuses, tensors that cannot be mapped, no thread: settings were read before.
            self.problem = str(refusal)
            logger.error("%s: this instance runs without a cache", refusal)

    def suspend(self) -> None:
        """Before vLLM's memory goes away: the session and what the driver has pinned stay."""
        if self._agent and not self._agent.suspend(SUSPEND_MS):
            # Copies into memory that goes now would be copies into somebody else's.
            raise RuntimeError("kvring: copies are still in flight: KV memory cannot go to sleep now")

    def register_again(self) -> None:
        """After vLLM's memory has been away."""
        if self._agent and self._memory_again:
            try:
                self._agent.resume(self._memory_again())
                return
            except (RuntimeError, ValueError) as refusal:
                logger.error("kvring: %s: opened anew", refusal)
        self.register(self._kv_caches)

    def fence(self, step: StepMetadata) -> None:
        """Pages of preempted requests are about to be overwritten: nobody may still be reading them."""
        tickets = [ticket for request_id in step.preempted for ticket in self._storing.get(request_id, ())]
        if tickets and self._agent:
            self._agent.fence(tickets, self._fence_ms)

    def load(self, step: StepMetadata) -> None:
        """Submits the step's loads."""
        for spec in step.loads:
            self._loads[spec.ticket] = spec
            try:
                if self._agent and spec.keys:
                    self._agent.load(spec.ticket, spec.lease, spec.first, spec.keys, spec.pages)
                    continue
            except Exception:
                logger.exception("kvring: a load was not taken")
            self._refused.append(spec.ticket)

    def store(self, step: StepMetadata) -> None:
        """Submits the step's stores; where pages may go without notice, waits until they are copied."""
        self._retained |= step.retained
        tickets = [spec.ticket for spec in step.stores if self._store(spec)]
        if self._saves_end_with_step and tickets and self._agent:
            self._agent.fence(tickets, self._fence_ms)

    def _store(self, spec: StoreSpec) -> bool:
        if not self._agent or not self._stores:
            self._ended[spec.ticket] = 1
            return False
        try:
            self._agent.store(spec.ticket, spec.parent, spec.first, spec.keys, spec.pages)
        except Exception:
            logger.exception("kvring: a store was not taken")
            self._ended[spec.ticket] = 1
            return False
        self._storing[spec.request_id].add(spec.ticket)
        self._of_ticket[spec.ticket] = spec.request_id
        return True

    def results(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose kept pages are free, whose loads have ended, and of those, which failed in part."""
        recving = set()
        all_ended, self._last = self._last, []
        all_ended += self._agent.poll() if self._agent else []
        for ended in all_ended:
            kind = self._seconds["load" if ended.is_load else "store"]
            kind[0] += 1
            kind[1] += ended.seconds
            if ended.is_load:
                spec = self._loads.pop(ended.ticket)
                recving.add(spec.request_id)
                self._missed(spec, ended.missed)
            else:
                self._ended[ended.ticket] = 1
                request_id = self._of_ticket.pop(ended.ticket)
                self._storing[request_id].discard(ended.ticket)
                if not self._storing[request_id]:
                    del self._storing[request_id]
        # Nothing will come of these: they end at once, with every block missing.
        refused, self._refused = self._refused, []
        for ticket in refused:
            spec = self._loads.pop(ticket)
            recving.add(spec.request_id)
            self._missed(spec, range(max(1, len(spec.keys) // kvring.KEY_BYTES)))
        sending = {request_id for request_id in self._retained if request_id not in self._storing}
        self._retained -= sending
        failed, self._failed_requests = self._failed_requests, set()
        return sending, recving, failed

    def _missed(self, spec: LoadSpec, missed: list[int] | range) -> None:
        if not missed:
            return
        if self._by_request:
            self._failed_requests.add(spec.request_id)
            return
        # Without keys the load was never well-formed: all its pages count as one block.
        per_block = len(spec.pages) * kvring.KEY_BYTES // (len(spec.keys) or kvring.KEY_BYTES)
        for block in missed:
            pages = spec.pages[block * per_block : (block + 1) * per_block]
            self._failed_pages.update(page for page in pages if page != kvring.NO_PAGE)

    def take_failed_pages(self) -> set[int]:
        """vLLM's ids of blocks that were not loaded."""
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def take_metadata(self) -> WorkerMetadata | None:
        """Stores that ended since the last call; once, why this worker moves nothing."""
        ended, self._ended = self._ended, {}
        problem, self._told = None if self._told == self.problem else self.problem, self.problem
        return WorkerMetadata(ended, problem) if ended or problem else None

    def take_counters(self) -> dict[str, float]:
        """Counters since the last call."""
        if not self._agent:
            return {}
        now = self._agent.counters()
        taken: dict[str, float] = {name: now[name] - self._counted.get(name, 0) for name in now if name != "sessions"}
        self._counted = now
        for kind, (count, seconds) in self._seconds.items():
            taken[f"{kind}s"], taken[f"{kind}_seconds"] = count, seconds
            self._seconds[kind] = [0, 0.0]
        return {name: value for name, value in taken.items() if value}

    def close(self) -> None:
        """Ends every ticket: vLLM's tensors are not touched after this."""
        if self._agent:
            self._agent.close()
            # Whatever was under way has ended with it, and is told of with the next step.
            self._last += self._agent.poll()
            self._agent = None
            self._counted = {}
