"""FlexKV's `KVManager` contract, between real processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import stop_server

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponseStatus
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

LAYERS, BLOCKS, SIZE, HEADS, HEAD = 3, 64, 16, 2, 32
TOKENS = np.arange(100, dtype=np.int64) * 7 % 501


class Rank:
    """A worker's tensors, one (2, blocks, tokens, heads, head) a layer."""

    def __init__(self, manager: KVManager, dp_client_id: int, rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (2, BLOCKS, SIZE, HEADS, HEAD)
        self.caches = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(LAYERS)]
        self.client = KVTPClient(manager.gpu_register_port, dp_client_id, rank, intra_client_id=rank)
        layout = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, BLOCKS, SIZE, HEADS, HEAD)
        self.client.register_to_server(self.caches, layout)

    def blocks(self, ids: list[int]) -> list[torch.Tensor]:
        return [cache[:, ids].clone() for cache in self.caches]


class Instance:
    def __init__(self, socket: str, dp_client_id: int, ranks: int = 1, seed: int = 1) -> None:
        model = ModelConfig(num_layers=LAYERS, num_kv_heads=HEADS * ranks, head_size=HEAD, tp_size=ranks)
        self.manager = KVManager(model, CacheConfig(tokens_per_block=SIZE, num_cpu_blocks=256), dp_client_id, socket)
        assert not self.manager.is_ready()
        self.manager.start()
        self.ranks = [Rank(self.manager, dp_client_id, rank, seed + rank) for rank in range(ranks)]
        deadline = time.monotonic() + 20
        while not self.manager.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        for rank in self.ranks:
            rank.client.close()
        self.manager.shutdown()


def slots(ids: list[int]) -> np.ndarray:
    return (np.asarray(ids)[:, None] * SIZE + np.arange(SIZE)).ravel()


@pytest.fixture
def socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = str(tmp_path / "flexkv")
    monkeypatch.setenv("KVRING_CLIENT_WAIT_MS", "2000")
    yield f"ipc://{path}"
    stop_server(path)


def put(instance: Instance, ids: list[int], namespace: list[str] | None = None) -> Any:
    task, mask = instance.manager.put_match(TOKENS, namespace=namespace)
    assert mask.sum() == len(ids) * SIZE and mask.dtype == bool and len(mask) == len(TOKENS)
    assert instance.manager.launch(task, slots(ids)) == [task]
    return instance.manager.wait(task)[task]


def test_one_instance_puts_another_gets_the_same_bytes(socket: str) -> None:
    first, second = Instance(socket, 0), Instance(socket, 1, seed=100)
    assert put(first, [9, 4, 30, 2, 51, 7]).status == KVResponseStatus.SUCCESS
    # Everything is there: nothing to put, and the task still ends.
    task, mask = second.manager.put_match(TOKENS)
    assert not mask.any()
    second.manager.launch(task, np.zeros(0, dtype=np.int64))
    assert second.manager.wait(task)[task].status == KVResponseStatus.SUCCESS

    # The first 32 tokens are on the second's own GPU already.
    have = np.arange(len(TOKENS)) >= 32
    task, mask = second.manager.get_match(TOKENS, have)
    assert np.flatnonzero(mask).tolist() == list(range(32, 96))
    assert second.manager.try_wait(task) == {}, "a plan has no end"
    assert second.manager.wait(task, timeout=0.01)[task].status == KVResponseStatus.UNREADY
    second.manager.launch([task], [slots([1, 2, 3, 4])])
    response = second.manager.wait([task])[task]
    assert response.status == KVResponseStatus.SUCCESS and (response.return_mask == mask).all()
    for put_layer, got_layer in zip(first.ranks[0].blocks([30, 2, 51, 7]), second.ranks[0].blocks([1, 2, 3, 4])):
        assert torch.equal(put_layer, got_layer)
    assert second.manager.wait(task)[task].status == KVResponseStatus.NOTFOUND, "an end is told once"

    # One leaves; the other's cache goes on.
    first.close()
    task = second.manager.get_async(TOKENS, slots([10, 11, 12, 13, 14, 15]))
    assert second.manager.wait(task)[task].status == KVResponseStatus.SUCCESS
    second.close()


def test_namespaces_cancel_batches_and_reset(socket: str) -> None:
    instance = Instance(socket, 0)
    manager = instance.manager
    put(instance, [1, 2, 3, 4, 5, 6], namespace=["x"])
    assert not manager.get_match(TOKENS)[1].any()
    assert not manager.get_match(TOKENS, namespace=["x", ""])[1].any(), "a namespace's parts do not run together"
    task, mask = manager.get_match(TOKENS, namespace=["x"])
    assert mask.sum() == 96
    manager.cancel(task)
    assert manager.wait(task)[task].status == KVResponseStatus.NOTFOUND

    tasks = [manager.get_match(TOKENS, namespace=["x"])[0] for _ in range(2)]
    (batch,) = manager.launch(tasks, [slots([11, 12, 13, 14, 15, 16]), slots([21, 22, 23, 24, 25, 26])], as_batch=True)
    response = manager.wait(batch)[batch]
    assert response.status == KVResponseStatus.SUCCESS and [m.sum() for m in response.return_mask] == [96, 96]
    (one,) = manager.launch([manager.get_match(TOKENS, namespace=["x"])[0]], [slots([1, 2, 3, 4, 5, 6])], as_batch=True)
    assert manager.wait(one)[one].status == KVResponseStatus.SUCCESS, "a batch of one is a batch"

    fetched = manager.prefetch_async(TOKENS, namespace=["x"])
    assert manager.wait(fetched)[fetched].return_mask.sum() == 96
    with pytest.raises(ValueError, match="96 are expected"):
        manager.launch(manager.get_match(TOKENS, namespace=["x"])[0], slots([1]))
    manager.reset()
    assert not manager.get_match(TOKENS, namespace=["x"])[1].any()
    instance.close()


def test_two_ranks_share_a_block_and_both_must_have_stored_it(socket: str) -> None:
    first, second = Instance(socket, 0, ranks=2), Instance(socket, 1, ranks=2, seed=50)
    assert put(first, [9, 4, 30, 2, 51, 7]).status == KVResponseStatus.SUCCESS
    task = second.manager.get_async(TOKENS, slots([1, 2, 3, 4, 5, 6]))
    assert second.manager.wait(task)[task].status == KVResponseStatus.SUCCESS
    for rank in range(2):
        for put_layer, got_layer in zip(
            first.ranks[rank].blocks([9, 4, 30, 2, 51, 7]), second.ranks[rank].blocks([1, 2, 3, 4, 5, 6])
        ):
            assert torch.equal(put_layer, got_layer)
    # A worker that goes away fails what it had, at once.
    task, _ = second.manager.get_match(TOKENS)
    second.ranks[1].client.close()
    second.manager.launch(task, slots([1, 2, 3, 4, 5, 6]))
    response = second.manager.wait(task, timeout=10)[task]
    assert response.status == KVResponseStatus.FAILED and not response.return_mask.any()
    assert not second.manager.is_ready()
    first.close()
    second.close()


def _serve_forever(socket: str, ready: Any) -> None:
    instance = Instance(socket, 0)
    put(instance, [1, 2, 3, 4, 5, 6])
    ready.set()
    time.sleep(600)


def test_instance_zero_may_be_killed(socket: str) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    zero = context.Process(target=_serve_forever, args=(socket, ready))
    zero.start()
    assert ready.wait(60)
    one = Instance(socket, 1, seed=9)
    zero.kill()
    zero.join()
    task, mask = one.manager.get_match(TOKENS)
    assert mask.sum() == 96
    one.manager.launch(task, slots([1, 2, 3, 4, 5, 6]))
    assert one.manager.wait(task)[task].status == KVResponseStatus.SUCCESS
    again = Instance(socket, 0)
    assert again.manager.get_match(TOKENS)[1].sum() == 96, "and come back"
    again.close()
    one.close()


def test_a_second_manager_of_one_id_is_refused_and_a_bad_job_answers(socket: str) -> None:
    first = Instance(socket, 0)
    with pytest.raises(ValueError, match="another KVManager has this dp_client_id"):
        KVManager(first.manager.model_config, first.manager.cache_config, 0, socket).start()
    with pytest.raises(ConnectionError, match="intra_client_id"):
        Rank(first.manager, 0, 0, 3)
    # A block that the tensors do not have: the task fails, the next one does not.
    assert put(first, [1, 2, 3, 4, 5, 6]).status == KVResponseStatus.SUCCESS
    task, _ = first.manager.get_match(TOKENS)
    first.manager.launch(task, slots([1, 2, 3, 4, 5, BLOCKS]))
    assert first.manager.wait(task, timeout=10)[task].status == KVResponseStatus.FAILED
    task = first.manager.get_async(TOKENS, slots([11, 12, 13, 14, 15, 16]))
    assert first.manager.wait(task, timeout=10)[task].status == KVResponseStatus.SUCCESS
    # Who shuts down ends what is under way.
    first.close()
    again = Instance(socket, 0)
    again.close()
