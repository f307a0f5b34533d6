"""What a model's blocks look like: read from vLLM's configuration, the same in every process of an instance."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

import kvring

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.kvring")

SECTOR_BYTES = 4096
_OWN = ("tenant", "load_timeout_ms", "store_timeout_ms", "fence_ms")
# Specs whose blocks depend on nothing but the tokens up to their end, and stay as they are once full.
_FULL = {"FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec"}
_WINDOWED = {"SlidingWindowSpec", "SlidingWindowMLASpec", "ChunkedLocalAttentionSpec"}


class Unsupported(Exception):
    """This model or configuration cannot be cached; the engine runs on without a cache."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How tokens become blocks, and blocks pages of vLLM's groups."""

    tokens_per_block: int
    pages_per_block: tuple[int, ...]
    """For each group: its pages in one block."""
    tokens_per_page: tuple[int, ...]
    is_windowed: bool
    """A group drops pages of a running request: its stores must be copied before the step ends."""

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> Geometry:
        parallel = vllm_config.parallel_config
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name, 1) > 1:
                raise Unsupported(f"{name} = {getattr(parallel, name)}: tokens are spread over ranks")
        if kv_cache_config is None:
            # FlexKV's contract: a connector with one group of vLLM's blocks.
            model = vllm_config.model_config
            if model.get_sliding_window() and not getattr(model.hf_text_config, "layer_types", None):
                raise Unsupported("every layer has a sliding window: use KvringConnector")
            size = vllm_config.cache_config.block_size
            return cls(size, (1,), (size,), False)
        windowed, sizes = False, []
        for group in kv_cache_config.kv_cache_groups:
            names = {type(spec).__name__ for spec in _specs(group.kv_cache_spec)}
            if not names <= _FULL | _WINDOWED:
                raise Unsupported(f"KV cache of kind {sorted(names - _FULL - _WINDOWED)}")
            windowed |= bool(names & _WINDOWED)
            sizes.append(group.kv_cache_spec.block_size)
        if not sizes:
            raise Unsupported("the model has no KV cache")
        tokens = math.lcm(*sizes)
        return cls(tokens, tuple(tokens // size for size in sizes), tuple(sizes), windowed)

    def pages(self, block_ids: tuple[list[int], ...], first: int, end: int, start_token: int = 0) -> list[int]:
        """The pages of blocks first..end; those before `start_token` and those that are gone are NO_PAGE."""
        pages = []
        for block in range(first, end):
            for ids, per_block, tokens in zip(block_ids, self.pages_per_block, self.tokens_per_page):
                for page in range(block * per_block, (block + 1) * per_block):
                    # vLLM's block 0 stands for "none".
                    there = page < len(ids) and ids[page] != 0 and page * tokens >= start_token
                    pages.append(ids[page] if there else kvring.NO_PAGE)
        return pages


def _specs(spec: Any) -> list[Any]:
    return list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]


def namespace(vllm_config: VllmConfig, geometry: Geometry, tenant: str | None) -> bytes:
    """The root of this model's keys: everything that changes KV bytes and that the scheduler knows."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    identity = {
        "model": _model(model),
        "revision": model.revision,
        "code_revision": model.code_revision,
        "commit": getattr(model.hf_config, "_commit_hash", None),
        "load_format": _load_format(vllm_config),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "hf_overrides": _overrides(getattr(model, "hf_overrides", None)),
        "long_rope_from": _long_rope(model),
        "cache_dtype": str(cache.cache_dtype),
        "tokens_per_block": geometry.tokens_per_block,
        "groups": geometry.tokens_per_page,
        "pp_size": parallel.pipeline_parallel_size,
        "shards": shards(vllm_config),
        "drafter": _drafter(vllm_config),
    }
    parts = [("model", json.dumps(identity, sort_keys=True))]
    return kvring.namespace_root([*parts, *([("tenant", tenant)] if tenant else [])])


def _model(model: Any) -> Any:
    """The model's name; for a directory, what it holds: weights may be written anew under one name."""
    directory = Path(model.model)
    if not directory.is_dir():
        return model.model
    directory = directory.resolve()
    kinds = (".safetensors", ".bin", ".pt", ".gguf", ".json")
    files = sorted(path for path in directory.iterdir() if path.suffix in kinds)
    return [str(directory), [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def _load_format(vllm_config: VllmConfig) -> str:
    load_format = str(getattr(vllm_config.load_config, "load_format", "auto"))
    return f"{load_format}/{vllm_config.model_config.seed}" if "dummy" in load_format else load_format


def _overrides(overrides: Any) -> str:
    if callable(overrides):
        return f"{overrides.__module__}.{overrides.__qualname__}"
    return str(overrides)


def _long_rope(model: Any) -> int | None:
    """With LongRoPE the longest length that is served decides how every key is rotated."""
    config = model.hf_text_config
    ropes = (getattr(config, "rope_scaling", None), getattr(config, "rope_parameters", None))
    return model.max_model_len if "longrope" in str(ropes).lower() else None


def _drafter(vllm_config: VllmConfig) -> str | None:
    """A drafter with KV of its own lies in the same blocks; one that looks words up does not."""
    drafter = vllm_config.speculative_config
    if drafter is None or "ngram" in str(getattr(drafter, "method", "")):
        return None
    return f"{getattr(drafter, 'method', None)}/{getattr(drafter, 'model', None)}"


def shards(vllm_config: VllmConfig) -> int:
    """Tensor-parallel ranks that hold different KV: one with MLA, never more than there are KV heads."""
    model, tp = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    if getattr(model, "use_mla", False):
        return 1
    return min(tp, model.get_total_num_kv_heads())


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of a block a rank holds, and whether it is the one that stores it."""

    index: int
    count: int
    stores: bool

    @classmethod
    def of(cls, vllm_config: VllmConfig, tp_rank: int, pp_rank: int) -> Part:
        parallel, of_stage = vllm_config.parallel_config, shards(vllm_config)
        replicas = parallel.tensor_parallel_size // of_stage
        index = pp_rank * of_stage + min(tp_rank // replicas, of_stage - 1)
        return cls(index, of_stage * parallel.pipeline_parallel_size, tp_rank % replicas == 0)


def memory(
    kv_caches: dict[str, torch.Tensor], kv_cache_config: KVCacheConfig | None, geometry: Geometry, part: Part
) -> kvring.Memory:
    """This rank's KV tensors, group by group."""
    if kv_cache_config is None:
        names, pages_count = [list(kv_caches)], None
        first = next(iter(kv_caches.values()), None)
        if first is not None and geometry.tokens_per_block not in tuple(getattr(first, "shape", ()))[1:]:
            raise Unsupported(f"KV tensors of shape {list(first.shape)}: a row is not one block")
    else:
        names = [[n for n in group.layer_names if n in kv_caches] for group in kv_cache_config.kv_cache_groups]
        pages_count = kv_cache_config.num_blocks
    groups = []
    for of_group, per_block in zip(names, geometry.pages_per_block):
        tensors, seen = [], set()
        for name in of_group:
            tensor = kv_caches[name]
            if not hasattr(tensor, "data_ptr"):
                raise Unsupported(f"layer {name} has no single KV tensor")
            if tensor.device.type not in ("cpu", "cuda"):
                raise Unsupported(f"KV memory on {tensor.device.type}: kvring copies from and to CPU memory and CUDA")
            # Layers that share one cache are one.
            identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if identity not in seen:
                seen.add(identity)
                tensors.append(tensor)
        rows = {tensor.shape[0] for tensor in tensors}
        if not tensors or len(rows) != 1 or (pages_count and rows.pop() % pages_count):
            raise Unsupported(f"KV tensors whose first dimension does not count blocks: {sorted(rows)}")
        per_page = tensors[0].shape[0] // pages_count if pages_count else 1
        groups.append(kvring.Group(tensors, pages_per_block=per_block, rows_per_page=per_page))
    whole = kvring.Memory(groups)
    return dataclasses.replace(whole, offset_in_slot=part.index * whole.block_bytes)


def layout(vllm_config: VllmConfig, geometry: Geometry, of_rank: kvring.Memory, part: Part) -> kvring.Layout:
    """What every instance that shares this cache must agree on."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    layers = model.get_num_layers(parallel) * parallel.pipeline_parallel_size
    if model.get_total_num_hidden_layers() != layers:
        raise Unsupported("pipeline stages of unequal depth")
    block_bytes = -(-of_rank.block_bytes * part.count // SECTOR_BYTES) * SECTOR_BYTES
    return kvring.Layout(
        model="@".join(filter(None, (model.model, model.revision))),
        dtype=f"{model.dtype}/{cache.cache_dtype}".removeprefix("torch."),
        tokens_per_block=geometry.tokens_per_block,
        layers=layers,
        kv_heads=1 if getattr(model, "use_mla", False) else model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        tp_size=part.count,
        pp_size=parallel.pipeline_parallel_size,
        kv_layout=f"{_backends(vllm_config)} {of_rank.describe()}",
        block_bytes=block_bytes,
    )


def _backends(vllm_config: VllmConfig) -> str:
    """The attention back ends: what a page's bytes mean is theirs to say."""
    layers = getattr(vllm_config.compilation_config, "static_forward_context", {}).values()
    names = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    return ",".join(sorted(names))


def instance(vllm_config: VllmConfig) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The token of this instance's processes, its settings, and what is the connector's own."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    extra = dict(transfer.kv_connector_extra_config or {})
    own = {
        name: extra.pop(name) for name in ("tenant", "load_timeout_ms", "store_timeout_ms", "fence_ms") if name in extra
    }
    settings = {name.removeprefix("kvring."): value for name, value in extra.items()}
    said, notes = kvring.load_config(**settings)
    for note in notes:
        logger.warning_once("kvring: %s", note)
    dp_size, dp_rank = parallel.data_parallel_size, getattr(parallel, "data_parallel_index", 0)
    if dp_size > 1 and "instance_id" in said:
        # As FlexKV numbers them: each data-parallel engine is an instance of its own.
        settings["instance_num"] = int(said.get("instance_num", 1)) * dp_size
        settings["instance_id"] = int(said["instance_id"]) * dp_size + dp_rank
    return f"{transfer.engine_id}/{dp_rank}", settings, own
