"""What the scheduler tells the workers, and what they say back. Pickled each step: plain and small."""

from __future__ import annotations

import dataclasses

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclasses.dataclass
class LoadSpec:
    """Blocks that a request waits for."""

    request_id: str
    ticket: int
    lease: tuple[int, int]
    first: int
    keys: bytes
    pages: list[int]


@dataclasses.dataclass
class StoreSpec:
    """Blocks that are full when the step has been computed."""

    request_id: str
    ticket: int
    parent: bytes
    first: int
    keys: bytes
    pages: list[int]


@dataclasses.dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's work."""

    loads: list[LoadSpec] = dataclasses.field(default_factory=list)
    stores: list[StoreSpec] = dataclasses.field(default_factory=list)
    preempted: set[str] = dataclasses.field(default_factory=set)
    """Their pages are about to be overwritten."""
    retained: set[str] = dataclasses.field(default_factory=set)
    """Finished, their pages kept until their stores have ended."""


@dataclasses.dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Stores that ended, by how many ranks have said so, and what keeps a worker from moving blocks."""

    ended: dict[int, int] = dataclasses.field(default_factory=dict)
    problem: str | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, WorkerMetadata)
        for ticket, ranks in other.ended.items():
            self.ended[ticket] = self.ended.get(ticket, 0) + ranks
        self.problem = self.problem or other.problem
        return self
