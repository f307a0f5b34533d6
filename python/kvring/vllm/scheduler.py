"""The scheduler's side: matches under a lease, decides what is loaded and stored.

Nothing here waits longer than `client_wait_ms` (10 ms unless set), and nothing raises into vLLM's
scheduler: what goes wrong is logged once and is a miss.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

import kvring
from kvring.vllm.events import EventSource
from kvring.vllm.geometry import Geometry, Unsupported, instance, namespace
from kvring.vllm.keys import BLOCKS_MAX, RequestKeys
from kvring.vllm.metadata import LoadSpec, StepMetadata, StoreSpec, WorkerMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvring")

FAILURES_MAX = 3
"""Requests in a row whose load failed, before matching pauses."""
PAUSE_SECONDS = 10.0
PAUSE_SECONDS_MAX = 600.0
"""The pause doubles while every load fails, as when this instance's workers are refused."""
STORE_SECONDS_MAX = 5.0
"""After this, a store that was handed to the workers has ended, whether or not a step has said so."""


def never_raises(miss: Callable[[], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A bug of ours is a miss and a line in the log, not the end of the engine."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception:
                logger.exception("kvring: %s", call.__name__)
                return miss()

        return guarded

    return wrap


@dataclasses.dataclass
class _Tracked:
    """What is known of a request."""

    request: Request
    keys: RequestKeys
    lease: kvring.Lease | None = None
    matched: int = 0
    start_token: int = 0
    is_loading: bool = False
    loading: frozenset[int] = frozenset()
    """Pages that are being loaded."""
    has_failed: bool = False
    """A load of it failed: it is computed, and not matched again."""
    stored: int = 0
    """Blocks that are in the cache or were handed to the workers."""
    tickets: dict[int, int] = dataclasses.field(default_factory=dict)
    """Stores under way: how many ranks have not said that they ended."""
    is_finished: bool = False


class SchedulerSide:
    """One per instance, in vLLM's EngineCore."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None, saves_end_with_step: bool = False
    ) -> None:
        self._requests: dict[str, _Tracked] = {}
        self._step = StepMetadata()
        self._tickets = itertools.count(1)
        self._failures = 0
        self._paused_until, self._pause = 0.0, PAUSE_SECONDS
        self._last_store = 0.0
        self._instance: kvring.Instance | None = None
        self._ranks = vllm_config.parallel_config.world_size
        self.counters = {"matches": 0, "tokens_asked": 0, "tokens_matched": 0, "loads_failed": 0}
        # A block that failed to load is recomputed: failing the request instead is no cache's business.
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        try:
            self._geometry = Geometry.of(vllm_config, kv_cache_config)
            token, settings, own = instance(vllm_config)
            self._root = namespace(vllm_config, self._geometry, own.get("tenant"))
            self._instance = kvring.Instance(token=token, **settings)
            number = int.from_bytes(kvring.namespace_id(self._root), "little")
            logger.info("kvring: namespace %032x", number)
        except Unsupported as reason:
            logger.warning("kvring does not cache this model: %s", reason)
        except ConnectionError as refusal:
            logger.error("%s: this instance runs without a cache", refusal)
        self._events = None
        if self._instance and getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False):
            self._events = EventSource(self._instance, self._geometry.tokens_per_block)
        # Pages of a running request may go, and nobody will ask us first: stores are copied within the step.
        self.saves_end_with_step = saves_end_with_step or (self.is_on and self._geometry.is_windowed)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do."""
        return self._instance is not None

    def turn_off(self, reason: str) -> None:
        """Nothing is matched or stored from here on."""
        if self._instance:
            logger.error("kvring is off: %s", reason)
            self._instance.close()
            self._instance = None

    def _track(self, request: Request) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.request is not request:
            keys = RequestKeys(request, self._root, self._geometry.tokens_per_block)
            tracked = self._requests[request.request_id] = _Tracked(request, keys)
        return tracked

    def _release(self, tracked: _Tracked) -> None:
        if tracked.lease and self._instance:
            self._instance.release(tracked.lease)
        tracked.lease = None

    @never_raises(lambda: (0, False))
    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """Tokens beyond `computed_tokens` that can be loaded, and that they are loaded behind."""
        if not self._instance or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        tracked, size = self._track(request), self._geometry.tokens_per_block
        self._release(tracked)
        tracked.matched = tracked.stored = 0
        if tracked.has_failed or time.monotonic() < self._paused_until:
            return 0, False
        blocks = tracked.keys.extend_to(request.num_tokens // size)
        if not blocks:
            return 0, False
        tracked.matched, tracked.lease = self._instance.match(tracked.keys.slice(0, blocks))
        tracked.stored, tracked.start_token = tracked.matched, computed_tokens
        if self._events:
            self._events.are_resident(tracked.request, tracked.keys, tracked.matched)
        found = tracked.matched * size - computed_tokens
        self.counters["matches"] += 1
        self.counters["tokens_asked"] += request.num_tokens - computed_tokens
        self.counters["tokens_matched"] += max(found, 0)
        if found <= 0 or tracked.lease is None:
            self._release(tracked)
            return 0, False
        first = computed_tokens // size
        self._instance.prefetch(tracked.lease, first, tracked.matched - first)
        return found, True

    def allocated(self, request: Request, block_ids: tuple[list[int], ...], external_tokens: int) -> None:
        """vLLM has pages for what was matched, or takes nothing of it."""
        try:
            self._allocated(request, block_ids, external_tokens)
        except Exception:
            logger.exception("kvring: allocated")
            if external_tokens:
                # vLLM waits for this load: it has failed, wholly.
                tracked = self._requests.get(request.request_id)
                start = tracked.start_token if tracked else 0
                at = zip(block_ids, self._geometry.tokens_per_page)
                pages = [page for ids, size in at for page in ids[start // size :] if page]
                self._step.loads.append(LoadSpec(request.request_id, next(self._tickets), (0, 0), 0, b"", pages))

    def _allocated(self, request: Request, block_ids: tuple[list[int], ...], external_tokens: int) -> None:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.is_loading:
            if external_tokens:
                raise RuntimeError("a load that was never matched, or twice")
            return
        if not external_tokens or tracked.lease is None:
            self._release(tracked)
            if external_tokens:
                raise RuntimeError("a load without a lease")
            return
        size, start = self._geometry.tokens_per_block, tracked.start_token
        first, end = start // size, (start + external_tokens) // size
        tracked.is_loading = True
        lease = (tracked.lease.id, tracked.lease.expires_at_ns)
        pages = self._geometry.pages(block_ids, first, end, start)
        tracked.loading = frozenset(pages)
        keys = tracked.keys.slice(first, end)
        self._step.loads.append(LoadSpec(request.request_id, next(self._tickets), lease, first, keys, pages))

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """This step's loads and stores."""
        step, self._step = self._step, StepMetadata()
        step.preempted = set(output.preempted_req_ids or ())
        for request_id in step.preempted & self._requests.keys():
            # Fenced before they are overwritten, and no pages of the request any more: nothing to keep.
            self._requests[request_id].tickets.clear()
        if self._instance is not None:
            self._add_stores(step, output)
        return step

    @never_raises(lambda: None)
    def _add_stores(self, step: StepMetadata, output: SchedulerOutput) -> None:
        if getattr(output, "has_sync_kv_loads", False):
            # Another connector loads within this step, and may fail: the next step stores.
            return
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            # Tokens that are known and whose KV is there when the step has been computed: no draft, which
            # may be rejected, and no placeholder of an output that is still being sampled.
            valid = min(computed[request_id] + scheduled - drafts, tracked.request.num_tokens)
            blocks = min(valid // self._geometry.tokens_per_block, BLOCKS_MAX)
            if blocks > tracked.stored:
                self._store(tracked, blocks, output.kv_connector_block_state.get_block_ids(request_id), step)

    def _store(
        self, tracked: _Tracked, blocks: int, block_ids: tuple[list[int], ...] | None, step: StepMetadata
    ) -> None:
        first, per_block = tracked.stored, sum(self._geometry.pages_per_block)
        tracked.stored = blocks
        if block_ids is None or tracked.keys.extend_to(blocks) < blocks:
            return
        pages = self._geometry.pages(block_ids, first, blocks)
        if kvring.NO_PAGE in pages:
            # What follows the last block that has lost a page can be stored, if what precedes is there.
            lost = len(pages) - 1 - pages[::-1].index(kvring.NO_PAGE)
            skipped = lost // per_block + 1
            first, pages = first + skipped, pages[skipped * per_block :]
        if first == blocks:
            return
        if self._events:
            self._events.are_offered(tracked.request, tracked.keys, first, blocks)
        ticket, keys = next(self._tickets), tracked.keys
        request_id = tracked.request.request_id
        step.stores.append(StoreSpec(request_id, ticket, keys.before(first), first, keys.slice(first, blocks), pages))
        self._last_store = time.monotonic()
        if not self.saves_end_with_step:
            tracked.tickets[ticket] = self._ranks

    @never_raises(lambda: False)
    def finished(self, request: Request) -> bool:
        """A request has ended. Whether its pages must be kept: a store of them is still under way."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return False
        if not tracked.is_loading:
            self._release(tracked)
        tracked.is_finished = True
        if tracked.is_loading:
            # vLLM keeps the pages until the load has ended, and nothing of it is being stored.
            tracked.tickets.clear()
        elif tracked.tickets:
            self._step.retained.add(request.request_id)
        else:
            del self._requests[request.request_id]
        return bool(tracked.tickets)

    @never_raises(lambda: None)
    def heard(self, output: KVConnectorOutput) -> None:
        """What the workers say after a step."""
        metadata = getattr(output, "kv_connector_worker_meta", None)
        if isinstance(metadata, WorkerMetadata):
            if metadata.problem:
                self.turn_off(f"a worker moves no blocks: {metadata.problem}")
            for tracked in list(self._requests.values()) if metadata.ended else ():
                for ticket in tracked.tickets.keys() & metadata.ended.keys():
                    tracked.tickets[ticket] -= metadata.ended[ticket]
                    if tracked.tickets[ticket] <= 0:
                        del tracked.tickets[ticket]
        failed = set(getattr(output, "failed_recving", None) or ())
        invalid = set(getattr(output, "invalid_block_ids", None) or ())
        # With several ranks, one may fail steps before the last one ends.
        for tracked in self._requests.values() if invalid or failed else ():
            if tracked.is_loading and (invalid & tracked.loading or tracked.request.request_id in failed):
                tracked.has_failed = True
        for request_id in output.finished_recving or ():
            if request_id not in self._requests:
                continue
            tracked = self._requests[request_id]
            tracked.is_loading = False
            self._release(tracked)
            tracked.loading = frozenset()
            if tracked.has_failed:
                # What did not come is computed, and stored again.
                tracked.stored = tracked.start_token // self._geometry.tokens_per_block
                self._failed()
            else:
                self._failures, self._pause = 0, PAUSE_SECONDS
            if tracked.is_finished and not tracked.tickets:
                del self._requests[request_id]
        for request_id in output.finished_sending or ():
            self._requests.pop(request_id, None)

    def _failed(self) -> None:
        self.counters["loads_failed"] += 1
        self._failures += 1
        if self._failures >= FAILURES_MAX:
            logger.warning("%d loads in a row have failed: no matches for %.0f s", self._failures, self._pause)
            self._paused_until, self._failures = time.monotonic() + self._pause, 0
            self._pause = min(2 * self._pause, PAUSE_SECONDS_MAX)

    @never_raises(list)
    def take_events(self) -> list[Any]:
        """What a KV-aware router should know of the shared cache."""
        return self._events.take() if self._events and self._instance else []

    def reset(self) -> bool:
        """Forgets every block of the server, for every instance: keys do not tell old weights from new."""
        if not self._instance:
            return True
        under_way = self._step.stores or any(tracked.tickets for tracked in self._requests.values())
        if under_way and time.monotonic() < self._last_store + STORE_SECONDS_MAX:
            # What is being stored now would be stored after the reset: of the old weights, perhaps.
            logger.warning("reset: stores are still under way; ask again")
            return False
        try:
            logger.info("reset: %d blocks forgotten", self._instance.reset())
            return True
        except ConnectionError as error:
            logger.error("reset: %s", error)
            return False

    def take_counters(self) -> dict[str, Any]:
        """Counters since the last call."""
        taken, self.counters = self.counters, dict.fromkeys(self.counters, 0)
        return {name: value for name, value in taken.items() if value}

    def close(self) -> None:
        """Leaves the server."""
        if self._instance:
            self._instance.close()
            self._instance = None
