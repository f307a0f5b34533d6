"""One vLLM of several processes: an API process, an engine core, a worker for each rank."""

import json
import os
import sys

from engine import QUIET

os.environ.update(QUIET)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=spec["model"], skip_tokenizer_init=True, enforce_eager=True, block_size=32, max_model_len=1024,
        kv_cache_memory_bytes=32 << 20, tensor_parallel_size=spec["ranks"],
        kv_transfer_config=spec["kv_transfer_config"],
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in spec["prompts"]], sampling, use_tqdm=False)
    answer = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "cached": [o.num_cached_tokens for o in outputs],
    }
    print("ANSWER " + json.dumps(answer), flush=True)
    # The engine core goes on storing.
    input()
