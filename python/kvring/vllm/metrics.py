"""What a connector counts, through vLLM's own statistics and Prometheus interface."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "matches": "Chains of blocks that were looked up.",
    "tokens_asked": "Tokens that were not in the engine's own cache and were looked up.",
    "tokens_matched": "Of those, tokens that were resident in the shared cache.",
    "blocks_loaded_dram": "Blocks loaded that were in the pool.",
    "blocks_loaded_ssd": "Blocks loaded that were read from the SSD.",
    "blocks_missed": "Blocks that were matched, did not come, and were computed.",
    "blocks_stored": "Blocks stored.",
    "blocks_present": "Blocks not stored because somebody had.",
    "blocks_dropped": "Blocks not stored for want of room, parent or server.",
    "loads": "Loads that ended, by rank.",
    "load_seconds": "Time from their submission to their end.",
    "stores": "Stores that ended, by rank.",
    "store_seconds": "Time from their submission to their end.",
    "loads_failed": "Requests of which a part was not loaded.",
}


class KvringStats(KVConnectorStats):
    """Sums by counter name."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        shown: dict[str, int | float] = {
            name: round(value, 6) if isinstance(value, float) else value for name, value in self.data.items()
        }
        if self.data.get("tokens_asked"):
            shown["hit_ratio"] = round(self.data.get("tokens_matched", 0) / self.data["tokens_asked"], 4)
        return shown

    def is_empty(self) -> bool:
        return not self.data


class KvringPromMetrics(KVConnectorPromMetrics):
    """`vllm:kvring_<counter>_total`, by engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            metric = self._counter_cls(name=f"vllm:kvring_{name}", documentation=text, labelnames=labelnames)
            self._counters[name] = {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
