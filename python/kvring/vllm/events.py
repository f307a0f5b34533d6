"""KV events: what became resident in the shared cache and what is gone, as vLLM publishes them.

The server's log names keys, and only who has seen the tokens can tell a router what they mean: this
instance announces the blocks it stores when they become resident, and those it has matched. It takes
back what it has announced when the block is gone, whoever evicted it.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored

import kvring

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvring.vllm.keys import RequestKeys

MEDIUM = "CPU"
BLOCKS_MAX = 1 << 17
"""Most blocks that are remembered as offered: older ones are not announced."""
LOG_BATCH = 1 << 13


class EventSource:
    """Turns the server's log into vLLM's events."""

    def __init__(self, instance: kvring.Instance, tokens_per_block: int) -> None:
        self._instance = instance
        self._tokens_per_block = tokens_per_block
        self._offered: collections.OrderedDict[bytes, dict[str, Any]] = collections.OrderedDict()
        self._announced: set[bytes] = set()
        self._waiting: list[Any] = []

    def _describe(self, request: Request, keys: RequestKeys, depth: int) -> dict[str, Any]:
        size, lora = self._tokens_per_block, getattr(request, "lora_request", None)
        return {
            "parent_block_hash": keys.parent(depth) or None,
            "token_ids": list(request.all_token_ids[depth * size : (depth + 1) * size]),
            "lora_id": getattr(lora, "adapter_id", None),
            "lora_name": getattr(lora, "name", None),
        }

    def are_offered(self, request: Request, keys: RequestKeys, first: int, end: int) -> None:
        """These blocks are about to be stored: they are announced when the log says that they are there."""
        for depth in range(first, end):
            self._offered[keys.key(depth)] = self._describe(request, keys, depth)
        while len(self._offered) > BLOCKS_MAX:
            self._offered.popitem(last=False)

    def are_resident(self, request: Request, keys: RequestKeys, end: int) -> None:
        """These blocks were matched: somebody stored them."""
        for depth in range(end):
            key = keys.key(depth)
            if key not in self._announced:
                self._announce(key, self._describe(request, keys, depth))

    def _announce(self, key: bytes, what: dict[str, Any]) -> None:
        self._announced.add(key)
        fields = {"block_hashes": [key], "block_size": self._tokens_per_block, "medium": MEDIUM, **what}
        self._waiting.append(BlockStored(**fields))

    def _gone(self, keys: list[bytes]) -> None:
        self._announced.difference_update(keys)
        self._waiting.append(BlockRemoved(block_hashes=keys, medium=MEDIUM))

    def take(self) -> list[Any]:
        """Events since the last call."""
        heard, lost = self._instance.events(LOG_BATCH)
        if lost and self._announced:
            self._gone(sorted(self._announced))
        gone: list[bytes] = []
        for is_stored, key in heard:
            if is_stored and key in self._offered and key not in self._announced:
                if gone:
                    self._gone(gone)
                    gone = []
                self._announce(key, self._offered.pop(key))
            elif not is_stored and key in self._announced:
                gone.append(key)
                self._announced.discard(key)
        if gone:
            self._gone(gone)
        taken, self._waiting = self._waiting, []
        return taken
