"""How the caller's KV tensors lie."""

from __future__ import annotations

import dataclasses
import enum


class KVCacheLayoutType(enum.Enum):
    LAYERFIRST = "LAYERFIRST"
    """A tensor a layer: (kv, blocks, tokens, heads, head size)."""
    BLOCKFIRST = "BLOCKFIRST"
    """One tensor: (blocks, layers, kv, tokens, heads, head size)."""
    LAYERBLOCK = "LAYERBLOCK"
    """A tensor a layer: (blocks, kv, tokens, heads, head size)."""


@dataclasses.dataclass
class KVCacheLayout:
    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    kv_dim: int = 2
    num_kv_heads: int = 1
