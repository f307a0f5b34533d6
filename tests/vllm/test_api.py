"""The `kvring` module by itself: tensors of any shape, errors that name what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from conftest import stop_server

import kvring
from kvring.vllm.keys import encode


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[dict[str, object]]:
    yield {"server_recv_port": tmp_path / "s", "cpu_cache_gb": 0.0625, "client_wait_ms": 2000, "hugepages": "off"}
    stop_server(tmp_path / "s")


def layout(memory: kvring.Memory, **more: object) -> kvring.Layout:
    fields = dict(model="m", dtype="bfloat16", tokens_per_block=16, layers=2, kv_heads=2, head_size=32,
                  kv_layout=memory.describe(), block_bytes=-(-memory.block_bytes // 4096) * 4096)  # fmt: skip
    return kvring.Layout(**{**fields, **more})


def ended(agent: kvring.Agent, ticket: int) -> kvring.Ended:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        agent.wait(at_most_ms=1000)
        for end in agent.poll():
            if end.ticket == ticket:
                return end
    raise AssertionError(f"ticket {ticket} never ended")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)])
def test_a_block_comes_back_whatever_the_strides(settings: dict[str, object], order: tuple[int, ...]) -> None:
    def tensors(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        logical = (8, 2, 16, 32)  # pages, heads, tokens, content
        made = []
        for _ in range(2):
            dense = torch.randn([logical[d] for d in order], generator=generator).to(torch.bfloat16)
            made.append(dense.permute([order.index(d) for d in range(4)]))
        return made

    ours, theirs = tensors(1), tensors(2)
    token = kvring.new_token()
    memory = kvring.Memory([kvring.Group(ours)])
    storing = kvring.Agent(layout(memory), memory, token=token, instance_id=0, instance_num=2, **settings)
    chain = kvring.KeyChain(kvring.namespace_root([("model", "m")]), 16)
    chain.extend(list(range(16 * 5 + 3)))
    assert len(chain) == 5
    storing.store(1, chain.before(0), 0, chain.keys, [5, 0, 7, 2, 1])
    assert ended(storing, 1).missed == []
    assert storing.counters()["blocks_stored"] == 5
    # An operator, who knows what the namespace is made of, finds its blocks.
    command = ["kvring", "namespaces", "--json", "--namespace", "model=m", "--socket", settings["server_recv_port"]]
    assert json.loads(subprocess.check_output(list(map(str, command)), text=True))["blocks"] == 5

    token = kvring.new_token()
    memory = kvring.Memory([kvring.Group(theirs)])
    loading = kvring.Agent(layout(memory), memory, token=token, instance_id=1, instance_num=2, **settings)
    scheduler = kvring.Instance(token=token, instance_id=1, instance_num=2, **settings)
    blocks, lease = scheduler.match(chain.keys)
    assert blocks == 5 and lease is not None
    before = theirs[0].clone()
    loading.load(7, lease, 1, chain.slice(1, 5), [3, kvring.NO_PAGE, 4, 6])
    assert ended(loading, 7).missed == []
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine[[0, 2, 1]], other[[3, 4, 6]])
    assert torch.equal(before[[0, 1, 2, 5, 7]], theirs[0][[0, 1, 2, 5, 7]]), "other pages are left alone"
    scheduler.release(lease)

    # A lease that is not there any more: every block is missed, none is wrong.
    for ticket in range(8, 1000):
        loading.load(ticket, lease, 0, chain.slice(0, 2), [0, 1])
        # The release travels on another ring.
        if missed := ended(loading, ticket).missed:
            break
    assert missed == [0, 1]
    for closing in (storing, loading, scheduler):
        closing.close()
    assert scheduler.match(chain.keys) == (0, None)
    with pytest.raises(RuntimeError, match="closed"):
        loading.load(9, lease, 0, chain.slice(0, 2), [0, 1])


def test_numpy_arrays_are_tensors_too(settings: dict[str, object]) -> None:
    ours = numpy.arange(4 * 8 * 512, dtype=numpy.int64).reshape(4, 8, 512).transpose(0, 2, 1)
    theirs = numpy.zeros((4, 8, 512), dtype=numpy.int64).transpose(0, 2, 1)
    memory = kvring.Memory([kvring.Group([ours])])
    chain = kvring.KeyChain(kvring.namespace_root([]), 1)
    chain.extend([1, 2])
    one = kvring.Agent(layout(memory), memory, instance_id=0, instance_num=2, **settings)
    one.store(1, b"", 0, chain.keys, [3, 1])
    assert ended(one, 1).missed == []
    token = kvring.new_token()
    memory = kvring.Memory([kvring.Group([theirs])])
    other = kvring.Agent(layout(memory), memory, token=token, instance_id=1, instance_num=2, **settings)
    scheduler = kvring.Instance(token=token, instance_id=1, instance_num=2, **settings)
    blocks, lease = scheduler.match(chain.keys)
    other.load(1, lease, 0, chain.keys, [0, 2])
    assert blocks == 2 and ended(other, 1).missed == []
    assert (theirs[[0, 2]] == ours[[3, 1]]).all() and not theirs[[1, 3]].any()
    other.close()
    one.close()


def test_wrong_input_is_named(settings: dict[str, object]) -> None:
    memory = kvring.Memory([kvring.Group([torch.zeros(4, 2, 16, 32)])])
    agent = kvring.Agent(layout(memory), memory, **settings)
    with pytest.raises(ValueError, match="pages of the tensors"):
        agent.store(1, b"", 0, bytes(16), [4])
    with pytest.raises(ValueError, match="1 pages for 2 keys: a block has 1, so 2 are expected"):
        agent.store(1, b"", 0, bytes(32), [1])
    with pytest.raises(ValueError, match="stored whole"):
        agent.store(1, b"", 0, bytes(16), [kvring.NO_PAGE])
    with pytest.raises(ValueError, match="at most 8192"):
        agent.load(1, (1, 1), 8192, bytes(16), [1])
    with pytest.raises(ValueError, match="multiple of 16"):
        agent.store(1, b"", 0, bytes(17), [1])
    with pytest.raises(ValueError, match="block_bytes = 2048"):
        kvring.Agent(layout(memory, block_bytes=2048), memory, **settings)
    with pytest.raises(ConnectionError, match='dtype: the server has "bfloat16", this instance "fp8"'):
        kvring.Agent(layout(memory, dtype="fp8"), memory, **{**settings, "instance_id": 0, "instance_num": 2})
    with pytest.raises(ValueError, match="neither data_ptr"):
        kvring.Group([object()])
    huge = kvring.Memory([kvring.Group([torch.zeros(2, 1 << 18, 2)[:, :, :1]])])
    with pytest.raises(ValueError, match="more than 65,536 runs"):
        kvring.Agent(layout(huge), huge, **settings)
    with pytest.raises(ValueError, match="stride of 0"):
        alias = kvring.Memory([kvring.Group([torch.zeros(1, 1, 1).expand(4, 8, 8)])])
        kvring.Agent(layout(alias), alias, **settings)
    with pytest.raises(ValueError, match="cpu_cache_gb"):
        kvring.Instance(cpu_cache_gb="many")
    with pytest.raises(ValueError, match="closest is cpu_cache_gb"):
        kvring.Instance(cpu_cach_gb=1)
    agent.close()


def test_without_a_server_everything_is_a_miss(tmp_path: Path) -> None:
    external = {"server_recv_port": tmp_path / "s", "server_launch_mode": "external", "start_wait_ms": 1}
    instance = kvring.Instance(**external)
    assert instance.match(bytes(16)) == (0, None) and not instance.is_connected
    memory = kvring.Memory([kvring.Group([torch.ones(4, 2, 16, 32)])])
    agent = kvring.Agent(layout(memory), memory, **external)
    agent.store(1, b"", 0, bytes(16), [0])
    assert ended(agent, 1) and agent.counters()["blocks_dropped"] == 1
    agent.load(2, (5, 1 << 62), 0, bytes(16), [0])
    assert ended(agent, 2).missed == [0]
    assert agent.fence([1, 2, 3], patience_ms=1)
    agent.close()


def test_extra_keys_of_different_values_never_meet() -> None:
    values = [
        None,
        0,
        1,
        "",
        "1",
        b"1",
        b"",
        1.0,
        (),
        ("1",),
        ("", "1"),
        ("1", ""),
        (("1",),),
        ("lora", "x"),
        ("salt", "x"),
    ]
    encoded = [encode(value) for value in values]
    assert len(set(encoded)) == len(values)
    with pytest.raises(TypeError):
        encode(object())


def test_keys_depend_on_no_process_seed() -> None:
    code = (
        "import kvring; chain = kvring.KeyChain(kvring.namespace_root([('model', 'm')]), 2); "
        "chain.extend([1, 2, 3, 4]); print(chain.keys.hex())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop().strip()) == 64


def test_the_comparison_runs_without_a_gpu() -> None:
    script = Path(__file__).parent.parent / "gpu" / "compare.py"
    said = subprocess.check_output([sys.executable, script, "--device", "cpu", "--size-mb", "1", "--rounds", "1"])
    lines = [json.loads(line) for line in said.splitlines()]
    kvring_s = [line for line in lines if line.get("method") == "kvring"]
    assert len(kvring_s) == 8 and all(line["gb_s"] > 0 for line in kvring_s), lines


def test_the_command_is_installed() -> None:
    program = kvring.server_program()
    assert (
        program and kvring.__version__ in subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    )


def test_what_keeps_a_server_away_is_said(tmp_path: Path, settings: dict[str, object]) -> None:
    memory = kvring.Memory([kvring.Group([torch.ones(4, 2, 16, 32)])])
    nowhere = {"ssd_cache_gb": 1, "ssd_cache_dir": "/proc/nope", "start_wait_ms": 3000}
    agent = kvring.Agent(layout(memory), memory, **{**settings, **nowhere})
    assert not agent.is_connected
    assert any("/proc/nope" in trouble and "directory" in trouble for trouble in agent.trouble), agent.trouble
    agent.close()
    # A server that was started with other settings is used, and said so.
    first = kvring.Agent(layout(memory), memory, **settings)
    other = kvring.Instance(**{**settings, "cpu_cache_gb": 0.125})
    assert any("cpu_cache_gb = 0.125: the server runs with 0.0625" in trouble for trouble in other.trouble)
    assert first.trouble == []
    other.close()
    first.close()
