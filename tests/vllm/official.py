"""The official vLLM's scheduler, KV cache manager and connector contract, with a model runner of ours.

The wheel from PyPI has no CPU kernels, but what drifts between versions is how the scheduler calls a
connector. The runner here writes, for each scheduled token, bytes that its whole prefix determines,
and after a load it compares every byte. Run by `test_official.py` with that vLLM first in its path.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from typing import Any

import torch
from vllm import SamplingParams
from vllm import __version__ as version
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.parallel_state import (
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK, LAYERS, HEADS, HEAD = 32, 2, 2, 32


def digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


def kv_of(tokens: list[int], position: int, layer: int) -> torch.Tensor:
    """What the KV of a position is: a function of everything before it."""
    seed = digest((tokens[: position + 1], layer))
    return torch.tensor(list(seed * (HEADS * HEAD * 4 // 32)), dtype=torch.uint8).view(torch.bfloat16)


class Instance:
    """A scheduler and one worker."""

    def __init__(self, model: str, transfer: dict[str, Any], blocks: int) -> None:
        self.config = VllmConfig(
            model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            parallel_config=ParallelConfig(),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=256,
                max_model_len=1024,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(**transfer),
        )
        self.config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD, dtype=torch.bfloat16)
        names = [f"layer.{n}" for n in range(LAYERS)]
        page = BLOCK * HEADS * HEAD * 2 * 2
        tensors = self._tensors(names, page * blocks)
        self.kv = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(names, spec)]
        )
        # (blocks, heads, tokens, keys and values): what the contract hands over.
        self.caches = {name: torch.zeros(blocks, HEADS, BLOCK, 2 * HEAD, dtype=torch.bfloat16) for name in names}
        if not model_parallel_is_initialized():
            one_rank(self.config)
        self.worker = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, self.kv)
        self.worker.register_kv_caches(self.caches)
        self.scheduler = Scheduler(
            vllm_config=self.config,
            kv_cache_config=self.kv,
            block_size=BLOCK,
            hash_block_size=BLOCK,
            structured_output_manager=StructuredOutputManager(self.config),
            log_stats=True,
        )
        init_none_hash(digest)
        self.hasher = get_request_block_hasher(BLOCK, digest)
        self.compared = 0

    @staticmethod
    def _tensors(names: list[str], size: int) -> list[KVCacheTensor]:
        fields = KVCacheTensor.__dataclass_fields__
        if "shared_by" in fields:
            return [KVCacheTensor(**{"size": size, "shared_by": [name]}) for name in names]
        return []

    def _tokens(self, request_id: str) -> list[int]:
        return list(self.scheduler.requests[request_id].all_token_ids)

    def _blocks(self, request_id: str) -> list[int]:
        return self.scheduler.kv_cache_manager.get_block_ids(request_id)[0]

    def step(self) -> None:
        output = self.scheduler.schedule()
        worker, metadata = self.worker, output.kv_connector_metadata
        worker.handle_preemptions(metadata)
        worker.bind_connector_metadata(metadata)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        sampled = []
        for request_id, count in output.num_scheduled_tokens.items():
            tokens, blocks, start = self._tokens(request_id), self._blocks(request_id), computed[request_id]
            # Everything before the scheduled tokens must be there already: computed here, or loaded.
            for position in range(start):
                self._compare(tokens, blocks, position)
            for position in range(start, start + count):
                for layer, cache in enumerate(self.caches.values()):
                    page = cache[blocks[position // BLOCK]]
                    page[:, position % BLOCK] = kv_of(tokens, position, layer).view(HEADS, 2 * HEAD)
            done = start + count >= len(tokens)
            sampled.append([(sum(tokens) + len(tokens)) % 500 + 3] if done else [])
        worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        said = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        ids = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={r: i for i, r in enumerate(ids)},
                sampled_token_ids=sampled,
                kv_connector_output=said,
            ),
        )

    def _compare(self, tokens: list[int], blocks: list[int], position: int) -> None:
        for layer, cache in enumerate(self.caches.values()):
            there = cache[blocks[position // BLOCK]][:, position % BLOCK]
            expected = kv_of(tokens, position, layer).view(HEADS, 2 * HEAD)
            assert torch.equal(there.view(torch.int16), expected.view(torch.int16)), f"position {position} is wrong"
            self.compared += 1

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Runs requests to their end. Says what was generated and how much came from the cache."""
        requests = []
        for n, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
            sampling.update_from_generation_config({}, 2)
            name = f"{id(self)}-{n}-{time.monotonic_ns()}"
            requests.append(
                Request(
                    request_id=name,
                    prompt_token_ids=prompt,
                    sampling_params=sampling,
                    pooling_params=None,
                    block_hasher=self.hasher,
                )
            )
            self.scheduler.add_request(requests[-1])
        prefills = [r.prefill_stats for r in requests]
        steps = 0
        while self.scheduler.has_unfinished_requests() or self.scheduler.has_finished_requests():
            self.step()
            steps += 1
            assert steps < 20_000, "the requests never ended"
            time.sleep(0.0005)
        return {
            "tokens": [list(r.output_token_ids) for r in requests],
            "cached": [prefill.num_external_cached_tokens for prefill in prefills],
            "compared": self.compared,
            "preempted": sum(r.num_preemptions for r in requests),
        }


def one_rank(config: VllmConfig) -> None:
    """Tensor- and pipeline-parallel groups of one, as a worker has them."""
    with tempfile.NamedTemporaryFile(delete=False) as rendezvous, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, "gloo")
        initialize_model_parallel(1, 1)


def main() -> None:
    spec = json.loads(sys.argv[1])
    first = Instance(spec["model"], spec["first"], 400)
    stored = first.run(spec["prompts"], 40)
    deadline = time.monotonic() + 10
    while first.scheduler.connector._scheduler._requests and time.monotonic() < deadline:
        first.step()
    second = Instance(spec["model"], spec["second"], 400)
    second.worker.unregister_kv_caches()
    second.worker.restore_kv_caches()
    loaded = second.run(spec["prompts"], 40)
    small = Instance(spec["model"], spec["third"], 24)
    squeezed = small.run(spec["prompts"] * 2, 40)
    print("ANSWER " + json.dumps({"version": version, "stored": stored, "loaded": loaded, "squeezed": squeezed}))
    for instance in (first, second, small):
        instance.worker.shutdown()
        instance.scheduler.shutdown()


if __name__ == "__main__":
    main()
