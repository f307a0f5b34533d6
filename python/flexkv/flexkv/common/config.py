"""The configuration that FlexKV's callers build. What kvring does not need is accepted and kept."""

from __future__ import annotations

from typing import Any, ClassVar


class _Fields:
    """Named fields with defaults; others are accepted, as FlexKV's versions differ in them."""

    _defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update({**self._defaults, **fields})

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items() if "password" not in name)
        return f"{type(self).__name__}({shown})"


class ModelConfig(_Fields):
    """What the model's KV looks like, and over how many ranks it lies."""

    _defaults: ClassVar[dict[str, Any]] = {
        "model": None,
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_size": 1,
        "kv_dim": 2,
        "use_mla": False,
        "dtype": "bfloat16",
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "instance_num": 1,
    }


class CacheConfig(_Fields):
    """Sizes. `FLEXKV_*` and `KVRING_*` go before these, as an operator goes before a program."""

    _defaults: ClassVar[dict[str, Any]] = {
        "tokens_per_block": 16,
        "enable_cpu": True,
        "enable_ssd": False,
        "num_cpu_blocks": None,
        "num_ssd_blocks": None,
        "ssd_cache_dir": None,
        "eviction_policy": None,
    }
