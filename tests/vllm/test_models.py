"""Models whose KV cache is not one plain group."""

from __future__ import annotations

from pathlib import Path

import model as tiny
from conftest import SHARED, Cache, eventually, prompt

from engine import Nursery


def test_a_hybrid_model_shares_full_and_windowed_layers(directory: Path, tmp_path: Path, nursery: Nursery) -> None:
    model = tiny.make_hybrid(directory / "gemma")
    prompts = [prompt(5, 400), prompt(6, 300)]
    plain = nursery.engine(model=str(model), enable_prefix_caching=False)
    expected = plain.generate(prompts, tokens=40)["tokens"]
    cache = Cache(tmp_path, nursery, model)
    try:
        first, second = cache.engine(), cache.engine()
        assert first.generate(prompts, tokens=40)["tokens"] == expected
        eventually("stored", lambda: cache.metric("commit_blocks_count") >= 12 + 9)
        answer = second.generate(prompts, tokens=40)
        assert answer["tokens"] == expected
        assert answer["cached"] == [384, 288]
        # Blocks that do not come are computed, whichever group's they are.
        losing = {**SHARED, "kv_connector": "LosingConnector", "kv_connector_module_path": "faults"}
        assert cache.engine(losing).generate(prompts, tokens=40)["tokens"] == expected
        # Only what lies in a layer's window is copied, and the tokens depend on it.
        assert cache.corrupt_pool() > 0
        assert cache.engine().generate(prompts, tokens=40)["tokens"] != expected
    finally:
        plain.close()
        cache.close()


def test_a_latent_attention_model_is_loaded_byte_for_byte(directory: Path, tmp_path: Path, nursery: Nursery) -> None:
    model = tiny.make_mla(directory / "deepseek")
    prompts = [prompt(7, 200)]
    cache = Cache(tmp_path, nursery, model)
    sixteen = {"block_size": 16}
    try:
        first, second = cache.engine(options=sixteen), cache.engine(options=sixteen)
        stored = first.generate(prompts, tokens=4)
        eventually("stored", lambda: cache.metric("commit_blocks_count") >= 12)
        answer = second.generate(prompts, tokens=4)
        assert answer["cached"] == [192]
        # Prefill and decode use other kernels here, so later tokens may differ without any cache.
        assert answer["tokens"][0][0] == stored["tokens"][0][0]
        assert cache.corrupt_pool() > 0
        assert cache.engine(options=sixteen).generate(prompts, tokens=4)["tokens"] != stored["tokens"]
    finally:
        cache.close()
