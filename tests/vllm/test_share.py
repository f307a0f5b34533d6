"""Two vLLMs, one cache: what the first computed, the second does not."""

from __future__ import annotations

import os
import signal
import time

from conftest import PROMPTS, SHARED, Cache, eventually, prompt

from engine import Engine

MATCHED = [192, 224]
"""Tokens of PROMPTS in full blocks of 32."""


def test_the_second_instance_answers_from_what_the_first_computed(cache: Cache, plain: Engine) -> None:
    expected = plain.generate(PROMPTS)["tokens"]
    first, second = cache.engine(), cache.engine()
    stored = first.generate(PROMPTS)
    assert stored["tokens"] == expected and stored["cached"] == [0, 0]
    eventually("13 blocks are stored", lambda: cache.metric("commit_blocks_count") == 13)
    loaded = second.generate(PROMPTS)
    assert loaded["tokens"] == expected
    assert loaded["cached"] == MATCHED
    assert cache.metric("load_blocks_dram_count") == 13
    eventually("leases are given back", lambda: cache.metric("leases_count") == 0)

    # The test can fail: with other bytes in the pool the tokens are others.
    assert cache.corrupt_pool() > 0
    third = cache.engine()
    wrong = third.generate(PROMPTS)
    assert wrong["cached"] == MATCHED and wrong["tokens"] != expected


def test_blocks_are_shared_while_their_request_still_runs(cache: Cache) -> None:
    first = cache.engine().ready()
    first.ask(do="generate", prompts=[PROMPTS[0]], tokens=1500)
    eventually(
        "the prompt's blocks are there",
        lambda: (cache.stats() or {}).get("metrics", {}).get("commit_blocks_count", 0) >= 6,
    )
    second = cache.engine()
    assert second.generate([PROMPTS[0]])["cached"] == [192]
    first.answer()
    # What was generated is a prefix too: 1,700 tokens fill 53 blocks.
    eventually("the answer's blocks are there", lambda: cache.metric("commit_blocks_count") >= 52)


def test_a_prefix_on_the_ssd_is_as_good(cache: Cache, plain: Engine) -> None:
    # 1 MiB of DRAM holds 64 blocks: the first prompts are on the SSD only when the last are stored.
    prompts = [prompt(10 + n, 480) for n in range(10)]
    tiers = {"cpu_cache_gb": 1 / 1024, "ssd_cache_gb": 1, "ssd_cache_dir": str(cache.directory / "ssd")}
    first, second = cache.engine(**tiers), cache.engine(**tiers)
    for one in prompts:
        first.generate([one])
        eventually("written", lambda: cache.metric("ssd_write_bytes") >= 16384 * cache.metric("blocks_count"))
    assert cache.metric("blocks_count") == 150
    answer = second.generate(prompts[:3])
    assert answer["tokens"] == plain.generate(prompts[:3])["tokens"]
    # vLLM computes the last token of a prompt that is wholly there.
    assert min(answer["cached"]) >= 479
    assert cache.metric("ssd_read_bytes") >= 40 * 16384


def test_salts_do_not_share(cache: Cache) -> None:
    first, second = cache.engine(), cache.engine()

    def cached(engine: Engine, salt: str) -> list[int]:
        engine.ask(do="generate", prompts=[PROMPTS[0]], tokens=4, extra={"cache_salt": salt})
        return engine.answer()["cached"]

    assert cached(first, "ours") == [0]
    eventually("stored", lambda: cache.metric("commit_blocks_count") == 6)
    assert cached(second, "theirs") == [0]
    assert cached(second, "ours") == [192]


def test_a_deferred_match_is_asked_again(cache: Cache, plain: Engine) -> None:
    cache.engine().generate(PROMPTS)
    deferring = {**SHARED, "kv_connector": "DeferringConnector", "kv_connector_module_path": "faults"}
    answer = cache.engine(deferring).generate(PROMPTS)
    assert (answer["cached"], answer["tokens"]) == (MATCHED, plain.generate(PROMPTS)["tokens"])


def test_blocks_that_do_not_come_are_computed(cache: Cache, plain: Engine) -> None:
    cache.engine().generate(PROMPTS)
    losing = {**SHARED, "kv_connector": "LosingConnector", "kv_connector_module_path": "faults"}
    engine = cache.engine(losing)
    assert engine.generate(PROMPTS)["tokens"] == plain.generate(PROMPTS)["tokens"]
    assert cache.metric("load_blocks_dram_count") < 13, "some were refused"


def test_preemption_under_a_small_kv_cache_changes_no_token(cache: Cache, plain: Engine) -> None:
    prompts = [prompt(30 + n, 200) for n in range(8)]
    expected = plain.generate(prompts, tokens=60)["tokens"]
    # 60 blocks of 32 tokens for 8 requests of 9 blocks each: somebody has to go.
    small = {"kv_cache_memory_bytes": 60 * 16384, "max_model_len": 512}
    cold, warm = cache.engine(options=small), cache.engine(options=small)
    assert cold.generate(prompts, tokens=60)["tokens"] == expected
    answer = warm.generate(prompts, tokens=60)
    assert answer["tokens"] == expected and min(answer["cached"]) > 0
    assert cold.call(do="metrics")["vllm:num_preemptions"] > 0


def test_an_instance_killed_in_the_middle_of_a_store_harms_nobody(cache: Cache, plain: Engine) -> None:
    prompts = [prompt(50 + n, 1000) for n in range(6)]
    victim, other = cache.engine().ready(), cache.engine().ready()
    victim.ask(do="generate", prompts=prompts, tokens=400)
    eventually("it stores", lambda: cache.metric("reserve_blocks_count") > 3)
    victim.kill()
    answer = other.generate(prompts[:2])
    assert answer["tokens"] == plain.generate(prompts[:2])["tokens"]
    eventually("its leases and slots come back", lambda: cache.metric("host_slots_quarantined_count") == 0)
    assert other.generate(PROMPTS)["tokens"] == plain.generate(PROMPTS)["tokens"]


def test_a_server_killed_between_requests_is_started_again(cache: Cache, plain: Engine) -> None:
    expected = plain.generate(PROMPTS)["tokens"]
    ssd = {"ssd_cache_gb": 1, "ssd_cache_dir": str(cache.directory / "ssd")}
    first, second = cache.engine(**ssd), cache.engine(**ssd)
    assert first.generate(PROMPTS)["tokens"] == expected
    eventually("on the SSD", lambda: cache.metric("ssd_header_writes_count") > 0)
    time.sleep(0.2)
    cache.kill_server()
    assert second.generate(PROMPTS)["tokens"] == expected, "without a server everything is computed"
    eventually("a new server serves", lambda: (cache.stats() or {}).get("metrics", {}).get("sessions_count", 0) >= 2)
    # The new server found the blocks on the SSD.
    third = cache.engine(**ssd)
    answer = third.generate(PROMPTS)
    assert answer["tokens"] == expected and answer["cached"] == MATCHED


def test_a_server_killed_between_match_and_load_costs_a_recompute(cache: Cache, plain: Engine) -> None:
    cache.engine().generate(PROMPTS)
    eventually("stored", lambda: cache.metric("commit_blocks_count") == 13)
    serverless = {**SHARED, "kv_connector": "ServerlessConnector", "kv_connector_module_path": "faults"}
    options = {"environment": {"KILL_SERVER": str(cache.server())}}
    engine = cache.engine(serverless, options=options)
    answer = engine.generate(PROMPTS)
    assert answer["tokens"] == plain.generate(PROMPTS)["tokens"]


def test_a_stopped_server_costs_milliseconds_not_requests(cache: Cache, plain: Engine) -> None:
    engine = cache.engine(client_wait_ms=10)
    engine.generate(PROMPTS)
    pid = cache.server()
    os.kill(pid, signal.SIGSTOP)
    try:
        unseen = [prompt(70 + n, 200) for n in range(6)]
        answer = engine.generate(unseen, tokens=40)
        assert answer["tokens"] == plain.generate(unseen, tokens=40)["tokens"]
        assert answer["seconds"] < 10, "a stopped server is a miss, not a wait"
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually("it is used again", lambda: engine.generate([prompt(90, 200)]) and cache.metric("blocks_count") > 13)


def test_a_reset_forgets_for_everybody(cache: Cache) -> None:
    first, second = cache.engine(), cache.engine()
    first.generate(PROMPTS)
    eventually("stored", lambda: cache.metric("commit_blocks_count") == 13)
    eventually(
        "local blocks are free",
        lambda: first.call(do="generate", prompts=[[5] * 40], tokens=2) and first.call(do="reset_all")["done"],
    )
    assert second.generate(PROMPTS)["cached"] == [0, 0]


def test_requests_that_are_aborted_leave_nothing_behind(cache: Cache, plain: Engine) -> None:
    first = cache.engine()
    first.generate(PROMPTS)
    eventually("stored", lambda: cache.metric("commit_blocks_count") == 13)
    engine = cache.engine()
    # Matched and loading after one step, computing after a few.
    aborted = [[PROMPTS[n % 2] if n % 3 else prompt(200 + n, 300), n % 6] for n in range(18)]
    assert engine.call(do="abort", prompts=aborted) == {"unfinished": False}
    answer = engine.generate(PROMPTS)
    assert answer["tokens"] == plain.generate(PROMPTS)["tokens"]
    # Leases go back with the steps that follow.
    eventually("nothing is leased", lambda: engine.generate([[9] * 40], 2) and cache.metric("leases_count") == 0)
    assert cache.metric("host_slots_quarantined_count") == 0
