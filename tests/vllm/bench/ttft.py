"""Time to first token of a second instance, by what shares the cache: nothing, kvring, or a peer. `local`
is the floor: the same prompts again in one engine, from its own cache.

    python ttft.py --python kvring=PYTHON --python lmcache=PYTHON --rounds 2

Each system runs a first instance that computes and stores, then a second one, in another process, that
is asked the same prompts one at a time. Systems alternate, round by round. A peer needs a Python of its
own with that peer and the same vLLM installed. Prints a table: p50, p10 and p90 over all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
# Engine processes find the shim too.
os.environ["PYTHONPATH"] = str(HERE)

PROMPTS, TOKENS = 12, 960


def prompts() -> list[list[int]]:
    return [[3 + (n * 7919 + (2 * n + 7) * i) % 2000 for i in range(TOKENS)] for n in range(PROMPTS)]


def transfer(system: str, place: Path) -> dict[str, Any] | None:
    match system:
        case "none" | "local":
            return None
        case "kvring":
            own = {
                "server_recv_port": str(place / "socket"),
                "cpu_cache_gb": 1,
                "hugepages": "off",
                "client_wait_ms": 200,
            }
            return {
                "kv_connector": "KvringConnector",
                "kv_role": "kv_both",
                "kv_connector_module_path": "kvring.vllm",
                "kv_connector_extra_config": own,
            }
        case "lmcache":
            own = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": 5600}
            return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": own}
        case "files":
            own = {"shared_storage_path": str(place)}
            return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": own}
        case "tiering":
            own = {
                "spec_name": "TieringOnHost",
                "spec_module_path": "cpu_offload_shim",
                "cpu_bytes_to_use": 1 << 30,
                "secondary_tiers": [{"type": "fs", "root_dir": str(place)}],
            }
            return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": own}
    raise ValueError(f"system = {system}: none, local, kvring, lmcache, files or tiering is expected")


def instance(system: str, place: Path, model: Path, wait: float) -> None:
    """One instance: prints its latencies."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model), skip_tokenizer_init=True, enforce_eager=True, block_size=32, max_model_len=2048,
        kv_cache_memory_bytes=512 << 20, kv_transfer_config=transfer(system, place), enable_prefix_caching=True,
        disable_log_stats=False,
    )  # fmt: skip
    first = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    # Kernels are warm after one that nobody shares.
    llm.generate([{"prompt_token_ids": [5 + os.getpid() % 900] * 64}], first, use_tqdm=False)
    if system == "local":
        # The floor: everything is in this very engine's own cache.
        for prompt in prompts():
            llm.generate([{"prompt_token_ids": prompt}], first, use_tqdm=False)
    seconds, cached, tokens = [], [], []
    for prompt in prompts():
        started = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], first, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        cached.append(output.num_cached_tokens)
        tokens.append(list(output.outputs[0].token_ids))
    time.sleep(wait)
    print("ANSWER " + json.dumps({"seconds": seconds, "cached": cached, "tokens": tokens}), flush=True)
    llm.llm_engine.engine_core.shutdown()


def peer(system: str, python: str) -> subprocess.Popen[bytes] | None:
    if system != "lmcache":
        return None
    program = str(Path(python).parent / "lmcache")
    options = "--l1-size-gb 1 --eviction-policy LRU --port 5600 --http-port 5680 --chunk-size 32 --no-l1-use-lazy"
    command = [program, "server", *options.split(), "--supported-transfer-mode", "auto", "--shm-name", "kvring-bench"]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(15)
    return started


def run(system: str, python: str, model: Path) -> dict[str, Any]:
    """A first and a second instance; what the second one said."""
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        server = peer(system, python)
        try:
            for wait in ("2", "0"):
                told = ["--model", str(model), "--wait", wait]
                command = [python, __file__, "--instance", system, "--place", place, *told]
                with tempfile.TemporaryFile("w+") as out:
                    # A file, not a pipe: an engine's helpers may outlive it and hold the pipe open.
                    subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
                    out.seek(0)
                    said = out.read()
                lines = [line for line in said.splitlines() if line.startswith("ANSWER ")]
                if not lines:
                    raise RuntimeError(f"{system}: {said[-3000:]}")
                answer = json.loads(lines[0].removeprefix("ANSWER "))
            return answer
        finally:
            if server:
                server.terminate()
                server.wait()
            if system == "kvring":
                program = Path(python).parent / "kvring"
                subprocess.run([program, "stop", "--socket", f"{place}/socket"], capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="SYSTEM=PYTHON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--instance", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wait", type=float, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.instance:
        return instance(arguments.instance, arguments.place, arguments.model, arguments.wait)
    pythons = dict(pair.split("=", 1) for pair in arguments.python) or {
        "none": sys.executable,
        "kvring": sys.executable,
    }
    with tempfile.TemporaryDirectory() as directory:
        made = [next(iter(pythons.values())), str(HERE.parent / "model.py"), f"{directory}/model", "--large"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        seconds: dict[str, list[float]] = {system: [] for system in pythons}
        cached: dict[str, set[int]] = {system: set() for system in pythons}
        tokens: dict[str, Any] = {}
        for turn in range(arguments.rounds):
            order = list(pythons) if turn % 2 == 0 else list(reversed(pythons))
            for system in order:
                answer = run(system, pythons[system], Path(directory) / "model")
                seconds[system] += answer["seconds"]
                cached[system].update(answer["cached"])
                tokens[system] = answer["tokens"]
                print(f"round {turn + 1}: {system} p50 {statistics.median(answer['seconds']) * 1e3:.1f} ms", flush=True)
    print(f"\nTTFT of the second instance, {TOKENS}-token prompts, {PROMPTS} × {arguments.rounds} requests")
    print(f"{'system':10} {'p50 ms':>9} {'p10 ms':>9} {'p90 ms':>9}  cached tokens; first tokens")
    same = next(iter(tokens.values()))
    for system, values in seconds.items():
        deciles = statistics.quantiles(values, n=10)
        what = "equal" if tokens[system] == same else f"{sum(a != b for a, b in zip(tokens[system], same))} differ"
        print(
            f"{system:10} {statistics.median(values) * 1e3:9.1f} {deciles[0] * 1e3:9.1f} {deciles[8] * 1e3:9.1f}"
            f"  {sorted(cached[system])}; {what}"
        )


if __name__ == "__main__":
    main()
