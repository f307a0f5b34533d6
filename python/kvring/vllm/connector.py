"""`KvringConnector`: vLLM's connector contract, answered by a scheduler's and a worker's side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvring.vllm.metadata import StepMetadata
from kvring.vllm.metrics import KvringPromMetrics, KvringStats
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class KvringConnector(KVConnectorBase_V1, SupportsHMA):
    """Shares KV blocks with every other instance on the machine through one kvring server."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._side: SchedulerSide | WorkerSide
        if role == KVConnectorRole.SCHEDULER:
            self._side = SchedulerSide(vllm_config, kv_cache_config)
        else:
            self._side = WorkerSide(vllm_config, kv_cache_config)

    @property
    def _scheduler(self) -> SchedulerSide:
        assert isinstance(self._side, SchedulerSide), "called in a worker"
        return self._side

    @property
    def _worker(self) -> WorkerSide:
        assert isinstance(self._side, WorkerSide), "called in the scheduler"
        return self._side

    @property
    def requires_kv_delivery(self) -> bool:
        # A store that is dropped is a miss tomorrow.
        return False

    @classmethod
    def supports_sleep_mode(cls, *_args: Any, **_kwargs: Any) -> bool:
        return True

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def unregister_kv_caches(self, *_args: Any, **_kwargs: Any) -> None:
        """Before the engine's memory goes to sleep."""
        self._worker.suspend()

    def restore_kv_caches(self, *_args: Any, **_kwargs: Any) -> None:
        """After it has come back."""
        self._worker.register_again()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if isinstance(kv_connector_metadata, StepMetadata):
            self._worker.fence(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: what a layer reads is there before its step is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        self._worker.store(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sending, recving, failed = self._worker.results()
        return KVConnectorTransferResults(sending, recving, failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        # For those who do not ask for transfer results: a request that failed must not look received.
        sending, recving, failed = self._worker.results()
        assert not failed, f"loads of {sorted(failed)} failed, and this caller cannot be told"
        return sending or None, recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_pages()

    def build_connector_worker_meta(self) -> Any:
        return self._worker.take_metadata()

    # Scheduler.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.heard(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request), None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._scheduler.take_events()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset()

    # Both.

    def get_kv_connector_stats(self) -> KvringStats | None:
        counters = self._side.take_counters()
        return KvringStats(counters) if counters else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvringStats:
        return KvringStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KvringPromMetrics:
        return KvringPromMetrics(*args, **kwargs)

    def shutdown(self) -> None:
        self._side.close()
