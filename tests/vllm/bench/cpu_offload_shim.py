"""Lets vLLM's tiered offloading run where KV memory is ordinary memory: for the benchmark beside it.

vLLM's worker copies on CUDA streams. Here a stream is nothing, an event is always there, and a copy is a
memmove, done when it is submitted. `spec_name` is TieringOnHost, `spec_module_path` cpu_offload_shim.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from vllm.v1.kv_offload.cpu import gpu_worker
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class _Nothing:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...
    def wait_stream(self, _stream: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def record(self, _stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: Any) -> float:
        return 0.0


class _Platform:
    Stream = _Nothing

    def current_stream(self) -> _Nothing:
        return _Nothing()

    def stream(self, _stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_xpu(self) -> bool:
        return False


class _Host(torch.Tensor):
    is_cuda = True


def _copy(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, **_kwargs: Any) -> None:
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist()):
        ctypes.memmove(target, source, size)


class TieringOnHost(TieringOffloadingSpec):
    """The tiered spec, with a worker for ordinary memory."""

    def get_worker(self, kv_caches: Any) -> Any:
        if self._worker is None:
            gpu_worker.current_platform = _Platform()
            gpu_worker._select_swap_blocks_fn = lambda *_args, **_kwargs: _copy
            torch.Event = _Nothing
            for tensor in kv_caches.tensors:
                object.__setattr__(tensor, "tensor", tensor.tensor.as_subclass(_Host))
            self._worker = self.create_worker(kv_caches)
        return self._worker
