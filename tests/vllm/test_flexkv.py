"""FlexKV's users change nothing."""

from __future__ import annotations

import subprocess
import sys

from conftest import PROMPTS, Cache, eventually, prompt

from engine import Engine


def test_flexkvs_connector_and_environment_run_on_kvring(cache: Cache, plain: Engine) -> None:
    expected = plain.generate(PROMPTS)["tokens"]
    # In any order: instance 1 is there before instance 0 has started the server.
    second = cache.flexkv(1, KVRING_START_WAIT_MS="100", KVRING_CLIENT_WAIT_MS="2000").ready()
    assert cache.stats() is None, "only instance 0 starts it"
    assert second.generate([prompt(8, 100)])["cached"] == [0]
    first = cache.flexkv(0, KVRING_CLIENT_WAIT_MS="2000")
    assert first.generate(PROMPTS)["tokens"] == expected
    eventually("13 blocks are stored", lambda: cache.metric("commit_blocks_count") >= 13)
    eventually("instance 1 has found the server", lambda: cache.metric("sessions_count") == 4)
    answer = second.generate(PROMPTS)
    assert (answer["tokens"], answer["cached"]) == (expected, [192, 224])
    # Any of them may leave: the server is nobody's child.
    first.kill()
    eventually("it is gone", lambda: cache.metric("sessions_count") == 2)
    third = cache.flexkv(2, KVRING_CLIENT_WAIT_MS="2000")
    answer = third.generate(PROMPTS)
    assert (answer["tokens"], answer["cached"]) == (expected, [192, 224])


def test_preemption_through_flexkvs_wrapper_changes_no_token(cache: Cache, plain: Engine) -> None:
    prompts = [prompt(30 + n, 200) for n in range(8)]
    small = {"kv_cache_memory_bytes": 60 * 16384, "max_model_len": 512}
    wrapper = {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"}
    expected = plain.generate(prompts, tokens=60)["tokens"]
    cold, warm = cache.engine(wrapper, options=small), cache.engine(wrapper, options=small)
    assert cold.generate(prompts, tokens=60)["tokens"] == expected
    assert warm.generate(prompts, tokens=60)["tokens"] == expected


def test_it_says_so_when_flexkv_itself_is_installed(tmp_path) -> None:
    metadata = tmp_path / "flexkv-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flexkv\nVersion: 1.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import flexkv"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0 and "pip uninstall flexkv kvring-flexkv" in ran.stderr
