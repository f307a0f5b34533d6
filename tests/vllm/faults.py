"""Connectors that misbehave on purpose, loaded by module path beside the real one."""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

from kvring.vllm import KvringConnector


class DeferringConnector(KvringConnector):
    """Says "ask again" twice before it answers a match."""

    asked: ClassVar[dict[str, int]] = {}

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        times = self.asked[request.request_id] = self.asked.get(request.request_id, 0) + 1
        if times <= 2:
            return None, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


class LosingConnector(KvringConnector):
    """Asks for every fifth block by a wrong key: the server refuses it, as it would after an I/O error."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for spec in self._get_connector_metadata().loads:
            keys = bytearray(spec.keys)
            for block in range(4, len(keys) // 16, 5):
                keys[block * 16] ^= 1
            spec.keys = bytes(keys)
        super().start_load_kv(forward_context, **kwargs)


class ServerlessConnector(KvringConnector):
    """Kills the server between the match and the load of the first request."""

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        pid = os.environ.pop("KILL_SERVER", None)
        if pid and num_external_tokens:
            os.kill(int(pid), 9)
            while os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().split()[2]:
                time.sleep(0.001)
