"""A vLLM in a process of its own, spoken to by JSON lines: started, asked, killed by a test.

`python engine.py SPEC` imports vLLM once and then forks an engine for each line it reads on its
standard input (a nursery): vLLM's import takes longer than an engine's start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUIET = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Nursery:
    """A process that has imported vLLM and forks engines."""

    def __init__(self, log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        environment = {**os.environ, **QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(HERE)}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engine.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdout=open(log, "ab"),
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        self._socket = ours
        self.log = log

    def engine(self, **spec: Any) -> Engine:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        text = json.dumps(spec).encode()
        socket.send_fds(self._socket, [text], [theirs.fileno()])
        theirs.close()
        return Engine(ours, self.log)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


class Engine:
    """One engine."""

    def __init__(self, channel: socket.socket, log: Path) -> None:
        self._channel, self._log = channel, log
        self._lines = channel.makefile("r")
        channel.settimeout(300)
        self.pid = self._answer()["pid"]
        self._ready = False

    def _answer(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"the engine is gone: see {self._log}\n{self._log.read_text()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ready(self) -> Engine:
        if not self._ready:
            self._answer()
            self._ready = True
        return self

    def ask(self, **question: Any) -> None:
        self.ready()
        self._channel.sendall(json.dumps(question).encode() + b"\n")

    def generate(self, prompts: list[list[int]], tokens: int = 8) -> dict[str, Any]:
        """{"tokens": [[...]], "cached": [...], "seconds": [...]}"""
        self.ask(do="generate", prompts=prompts, tokens=tokens)
        return self._answer()

    def answer(self) -> dict[str, Any]:
        return self._answer()

    def call(self, **question: Any) -> dict[str, Any]:
        self.ask(**question)
        return self._answer()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.ask(do="close")
        self._lines.readline()


def _serve(channel: socket.socket, spec: dict[str, Any]) -> None:
    lines = channel.makefile("r")

    def say(**words: Any) -> None:
        channel.sendall(json.dumps(words).encode() + b"\n")

    say(pid=os.getpid())
    os.environ.update(spec.pop("environment", {}))
    try:
        from vllm import LLM, SamplingParams

        options: dict[str, Any] = dict(
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=32,
            kv_cache_memory_bytes=64 << 20,
            max_model_len=2048,
            disable_log_stats=False,
            enable_prefix_caching=True,
        )
        options.update(spec)
        if "kv_events_config" in options:
            from vllm.config import KVEventsConfig

            options["kv_events_config"] = KVEventsConfig(**options["kv_events_config"])
        llm = LLM(**options)
        say(ready=True)
        for line in lines:
            question = json.loads(line)
            match question["do"]:
                case "generate":
                    sampling = SamplingParams(
                        temperature=0.0, max_tokens=question["tokens"], ignore_eos=True, detokenize=False
                    )
                    prompts = [{"prompt_token_ids": p} | question.get("extra", {}) for p in question["prompts"]]
                    started = time.monotonic()
                    outputs = llm.generate(prompts, sampling, use_tqdm=False)
                    seconds = time.monotonic() - started
                    say(
                        tokens=[list(o.outputs[0].token_ids) for o in outputs],
                        cached=[o.num_cached_tokens for o in outputs],
                        seconds=seconds,
                    )
                case "abort":
                    # Requests that are given up at every point of their life.
                    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
                    core = llm.llm_engine
                    for n, (prompt, steps) in enumerate(question["prompts"]):
                        name = core.add_request(f"abort-{n}", {"prompt_token_ids": prompt}, sampling)
                        for _ in range(steps):
                            core.step()
                        core.abort_request([name or f"abort-{n}"])
                    for _ in range(2000):
                        if not core.has_unfinished_requests():
                            break
                        core.step()
                    say(unfinished=core.has_unfinished_requests())
                case "reset_local":
                    say(done=llm.reset_prefix_cache())
                case "reset_all":
                    say(done=llm.llm_engine.reset_prefix_cache(reset_connector=True))
                case "metrics":
                    found = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
                    say(**{name: value for name, value in found.items() if value is not None})
                case "close":
                    say(done=True)
                    break
    except BaseException as error:
        import traceback

        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")
        raise


def main() -> None:
    nursery = socket.socket(fileno=int(sys.argv[1]))
    import torch  # noqa: F401
    import vllm  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.v1.engine.core import EngineCore  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        text, fds, _flags, _address = socket.recv_fds(nursery, 1 << 16, 1)
        if not text:
            return
        if os.fork() == 0:
            nursery.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve(socket.socket(fileno=fds[0]), json.loads(text))
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
