"""How a task ended."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np


class KVResponseStatus(enum.Enum):
    SUCCESS = "success"
    NOTFOUND = "not_found"
    UNREADY = "unready"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclasses.dataclass
class KVResponse:
    """A task's end. `return_mask` is True for the tokens that were really moved."""

    status: KVResponseStatus
    task_id: int
    return_mask: np.ndarray | list[np.ndarray] | None

    def get_mask(self, idx: int) -> np.ndarray:
        assert isinstance(self.return_mask, list) and idx < len(self.return_mask)
        return self.return_mask[idx]
