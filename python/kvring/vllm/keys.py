"""Keys of a request's blocks: ours, over its tokens and over whatever else vLLM says that they depend on."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

import kvring

if TYPE_CHECKING:
    from vllm.v1.request import Request

BLOCKS_MAX = 8192
"""The longest chain that can be matched."""


def encode(value: Any) -> bytes:
    """Bytes that no other value has: kind, length, content."""
    match value:
        case None:
            kind, content = b"n", b""
        case bool() | int():
            kind, content = b"i", str(int(value)).encode()
        case float():
            kind, content = b"f", struct.pack("<d", value)
        case str():
            kind, content = b"s", value.encode()
        case bytes() | bytearray():
            kind, content = b"b", bytes(value)
        case tuple() | list():
            kind, content = b"t", b"".join(encode(item) for item in value)
        case _:
            raise TypeError(f"an extra key of type {type(value).__name__}")
    return kind + struct.pack("<Q", len(content)) + content


class RequestKeys:
    """The chain of one request, extended as it grows."""

    def __init__(self, request: Request, root: bytes, tokens_per_block: int) -> None:
        self._request = request
        self._tokens_per_block = tokens_per_block
        self._chain = kvring.KeyChain(root, tokens_per_block)
        self._next_mm = 0

    def extend_to(self, blocks: int) -> int:
        """Has the keys of the first `blocks` blocks, as far as there are tokens; says how many there are."""
        request, size, first = self._request, self._tokens_per_block, len(self._chain)
        end = min(blocks, request.num_tokens // size, BLOCKS_MAX)
        if end <= first:
            return min(len(self._chain), blocks)
        extras, next_mm = {}, self._next_mm
        for block in range(first, end):
            extra, next_mm = generate_block_hash_extra_keys(request, block * size, (block + 1) * size, next_mm)
            if extra:
                extras[block - first] = [encode(item) for item in extra]
        self._chain.extend(request.all_token_ids[first * size : end * size], extras)
        self._next_mm = next_mm
        return end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)
