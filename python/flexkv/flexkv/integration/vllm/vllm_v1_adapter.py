"""What vLLM's in-tree `FlexKVConnectorV1` imports.

That wrapper forwards neither preemptions nor worker metadata, so a step's stores are copied before the
step ends: nothing has to be told of pages that change hands later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import flexkv  # noqa: F401  (refuses to run beside FlexKV itself)
from kvring.vllm.metadata import StepMetadata
from kvring.vllm.scheduler import SchedulerSide
from kvring.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch


class FlexKVConnectorV1Impl:
    """One per process of a vLLM instance, as vLLM's wrapper makes it."""

    def __init__(self, vllm_config: Any, role: Any, *_more: Any, **_named: Any) -> None:
        is_scheduler = role.name == "SCHEDULER"
        self._scheduler = SchedulerSide(vllm_config, None, saves_end_with_step=True) if is_scheduler else None
        self._worker = None if is_scheduler else WorkerSide(vllm_config, None, saves_end_with_step=True)

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor], *_more: Any, **_named: Any) -> None:
        self._worker.register(kv_caches)

    def _step(self) -> StepMetadata | None:
        """This step's metadata: vLLM binds it to the wrapper, which does not hand it on."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        group = get_kv_transfer_group()
        for connector in (group, *getattr(group, "_connectors", ())):
            if getattr(connector, "_flexkv_connector", None) is self:
                metadata = connector._connector_metadata
                return metadata if isinstance(metadata, StepMetadata) else None
        return None

    def start_load_kv(self, forward_context: Any, **_named: Any) -> None:
        if step := self._step():
            self._worker.load(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: what a layer reads is there before its step is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_named: Any) -> None:
        """Blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        if step := self._step():
            self._worker.store(step)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Nothing is being read between steps."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        sending, recving, _failed = self._worker.results()
        return sending or None, recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_pages() if self._worker else set()

    def before_device_sleep(self, *_more: Any) -> None:
        """The engine's memory goes away: nothing of ours touches it after this."""
        if self._worker:
            self._worker.suspend()

    def after_device_wake(self, *_more: Any) -> None:
        if self._worker:
            self._worker.register_again()

    # Scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int, *_more: Any) -> None:
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduler.heard(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request), None

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events()

    def reset_cache(self) -> bool:
        return self._scheduler.reset()

    # Both.

    def get_kv_connector_stats(self) -> None:
        """vLLM's wrapper cannot name their type: `kvring stat` has the counters."""
        return None

    def shutdown(self) -> None:
        (self._scheduler or self._worker).close()
