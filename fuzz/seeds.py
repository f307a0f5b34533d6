#!/usr/bin/env python3
"""Writes the seeds under fuzz/corpus: one file a story, each in its target's own words.

A target says in its first lines how it reads an input. Whoever changes that runs this again.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
ARENA_BYTES = 1 << 20
PING, MATCH, RELEASE, LOAD, PREFETCH, RESERVE, COMMIT, ABORT, CANCEL = range(1, 10)


def save(target: str, stories: dict[str, bytes]) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, text in stories.items():
        (folder / name).write_bytes(text)


def entry(*words: int, arena: int = ARENA_BYTES) -> bytes:
    padded = (*words, *[0] * (8 - len(words)))
    return struct.pack("<8QI", *(word & (1 << 64) - 1 for word in padded), arena)


def head(op: int, count: int = 0, first: int = 0) -> int:
    return op | count << 16 | first << 32


def slot_table() -> dict[str, bytes]:
    described = b"".join(bytes([0x41, name, name - 1 if name > 1 else 0, name - 1, 3]) for name in range(1, 13))
    return {
        "empty": b"\0" + bytes(12),
        "a_chain": b"\0" + described,
        "writers": b"\1" + bytes([2, 7] * 12),
        "blocks_and_writers": b"\2" + b"".join(bytes([0x43, name, 0, 0, 1, name]) for name in range(1, 13)),
        "a_damaged_head": b"\0" + bytes(12) + struct.pack("<HB", 8, 8) + b"\xff" * 8,
        "torn_headers": b"\0" + described + struct.pack("<HB", 129, 64) + b"\x5a" * 64,
        "the_same_key_twice": b"\0" + bytes([0x41, 1, 0, 0, 3] * 12),
        "no_parent": b"\0" + bytes([0x41, 9, 8, 4, 3] * 12),
    }


def wire() -> dict[str, bytes]:
    stories = {
        "ping": entry(1, head(PING)),
        "match": entry(2, head(MATCH, 8192), 0),
        "match_of_too_many": entry(2, head(MATCH, 8193), 0),
        "release": entry(3, head(RELEASE), 0, 1 << 32 | 5),
        "load": entry(4, head(LOAD, 256, 8192 - 256), 4096, 1 << 32),
        "load_beyond_the_chain": entry(4, head(LOAD, 256, 8192), 4096, 1 << 32),
        "prefetch": entry(5, head(PREFETCH, 3, 7), 0, 1 << 32),
        "reserve": entry(6, head(RESERVE, 2, 1), 64, 0, 11, 12),
        "reserve_to_the_arena_s_end": entry(6, head(RESERVE, 1), ARENA_BYTES - 16),
        "reserve_past_the_arena_s_end": entry(6, head(RESERVE, 2), ARENA_BYTES - 16),
        "commit": entry(7, head(COMMIT, 256), 16),
        "commit_unaligned": entry(7, head(COMMIT, 1), 8),
        "abort": entry(8, head(ABORT, 1), 0),
        "cancel": entry(9, head(CANCEL), 0, 0, 0, 0, 4),
        "unknown": entry(10, head(10, 1)),
        "nothing": entry(),
        "all_ones": entry(*[-1] * 8, arena=0xFFFFFFFF),
        "span_wraps": entry(7, head(MATCH, 8192), 0xFFFFFFF0, arena=0xFFFFFFFF),
        "completion_of_a_load": entry(4, LOAD | 3 << 16 | 6 << 32 | 2 << 48, *(1 << 32 | slot for slot in range(6))),
        "completion_quota": entry(4, MATCH | 9 << 8 | 1 << 16),
    }
    return stories


LAYOUT = {
    "model": "opaque",
    "dtype": "u8",
    "tokens_per_block": 1,
    "layers": 1,
    "kv_heads": 1,
    "head_size": 1,
    "tp_size": 1,
    "pp_size": 1,
    "kv_layout": "block_first",
    "block_bytes": 4096,
    "key_contract": 1,
}


def handshake() -> dict[str, bytes]:
    def attach(layout: object) -> dict[str, object]:
        said = {"protocol": 2, "instance_id": 0, "instance_token": "t", "rank": 0}
        return {"request": "attach", **said, "layout": layout}

    welcome = {"session": 1, "pool_bytes": 65536, "slot_bytes": 4096, "slots_count": 16, "page_bytes": 4096}
    difference = {"field": "tp_size", "server": "1", "instance": "2"}
    messages: dict[str, object] = {
        "attach": attach(LAYOUT),
        "attach_a_scheduler": attach(None),
        "attach_no_bytes": attach(LAYOUT | {"block_bytes": 0}),
        "attach_odd_bytes": attach(LAYOUT | {"block_bytes": 6000}),
        "attach_huge": attach(LAYOUT | {"block_bytes": (1 << 64) - 1, "tp_size": 4294967295}),
        "attach_many_ranks": attach(LAYOUT | {"tp_size": 33}),
        "attach_no_ranks": attach(LAYOUT | {"tp_size": 0}),
        "attach_another_contract": attach(LAYOUT | {"key_contract": 7}),
        "attach_an_unknown_field": attach(LAYOUT | {"extra": 1}),
        "attach_escapes": attach(LAYOUT | {"model": '"\\\u0000\u2028\U0001f512', "dtype": ""}),
        "attach_negative": attach(LAYOUT | {"layers": -1}),
        "goodbye": {"request": "goodbye"},
        "stats": {"request": "stats"},
        "reset": {"request": "reset"},
        "stop": {"request": "stop"},
        "unknown": {"request": "dance"},
        "welcome": {"reply": "welcome", **welcome, "server_pid": 1, "settings": {"cpu_cache_gb": "16"}},
        "refused": {"reply": "refused", "reason": "no", "differences": [difference], "permanent": True},
        "answer_stats": {"reply": "stats", "hits": 1, "deep": [[{"a": 1.5e300}]]},
        "answer_reset": {"reply": "reset", "blocks": 3, "durable": False},
        "stopping": {"reply": "stopping"},
    }
    stories = {name: json.dumps(message, ensure_ascii=False).encode() for name, message in messages.items()}
    stories["cut"] = stories["attach"][:50]
    stories["deep"] = b"[" * 200
    stories["twice"] = b'{"request":"stop","request":"stats"}'
    stories["no_text"] = b"\xff\xfe\x00"
    return stories


def header(key: int, parent: int = 0, depth: int = 0, generation: int = 1, how: int = 0, more: bytes = b"") -> bytes:
    return bytes([how, key, parent, generation, depth]) + more


def superblock_and_headers() -> dict[str, bytes]:
    nothing = bytes([1])
    zeros = bytes(64)
    chain = b"".join(header(depth + 1, depth, depth) for depth in range(20))

    def disk(*headers: bytes, shape: int = 0, how: int = 0, superblock: bytes = zeros) -> bytes:
        return bytes([shape, how]) + superblock + b"".join(headers)

    def words(*values: int) -> bytes:
        return struct.pack("<8Q", *values)

    return {
        "empty": disk(),
        "a_chain": disk(chain),
        "a_chain_on_two_devices": disk(chain, shape=0x13),
        "a_chain_backwards": disk(*(header(depth + 1, depth, depth) for depth in reversed(range(20)))),
        "a_tree": disk(header(1), *(header(2 + child, 1, 1) for child in range(9)), header(30, 3, 2), header(31, 3, 2)),
        "no_parent": disk(header(2, 1, 1)),
        "its_own_parent": disk(header(1, 1, 1), header(1, 1, 0)),
        "two_are_each_other_s_parents": disk(header(1, 2, 1), header(2, 1, 1)),
        "a_cycle_over_depths": disk(header(1, 3, 1), header(2, 1, 2), header(3, 2, 3)),
        "one_key_twice": disk(header(1), header(1), header(2, 1, 1), header(2, 1, 1)),
        "one_key_at_two_depths": disk(header(1), header(2, 1, 1), header(1, 2, 2), header(3, 1, 1), header(4, 1, 3)),
        "a_wrong_depth": disk(header(1), header(2, 1, 2), header(3, 1, 200)),
        "the_deepest_depth": disk(header(1, how=8, more=struct.pack("<II", 0xFFFFFFFF, 1)), header(2, 1)),
        "the_key_of_zeros": disk(header(0), header(1, 0, 1)),
        "no_generation": disk(header(1, generation=0), header(2, 1, 1)),
        "the_last_generation": disk(header(1, how=8, more=struct.pack("<II", 0, 0xFFFFFFFF)), header(2, 1, 1)),
        "another_slot_s": disk(header(1, how=16, more=struct.pack("<I", 1)), header(2, 1, 1)),
        "a_slot_beyond_all": disk(header(1, how=16, more=struct.pack("<I", 0xFFFFFFFF))),
        "another_layout_s": disk(header(1, how=64, more=struct.pack("<Q", 5)), header(2, 1, 1)),
        "a_flipped_bit_of_a_sum": disk(header(1, how=128, more=b"\x03"), header(2, 1, 1)),
        "reserved_is_not_zero": disk(header(1, how=32, more=struct.pack("<I", 9)), header(2, 1, 1)),
        "garbage": disk(*(bytes([3]) + bytes(range(slot, slot + 64)) for slot in range(20))),
        "garbage_with_good_sums": disk(*(bytes([7]) + bytes(range(slot, slot + 64)) for slot in range(20))),
        "holes": disk(header(1), nothing, header(2, 1, 1), nothing, nothing, header(3, 2, 2)),
        "ours_on_files": disk(chain, shape=12),
        "ours_on_two_devices": disk(chain, shape=15, how=1),
        "ours_cut_short": disk(chain, shape=12, how=2 | 100 << 2 & 0xFC),
        "of_another_layout": disk(chain, shape=12, superblock=words(0, 5, 0, 0, 0, 0, 0, 0)),
        "of_another_size": disk(chain, shape=12, superblock=words(0, 0, 8192, 0, 0, 0, 0, 0)),
        "of_more_slots_reset": disk(chain, shape=12, how=4, superblock=words(0, 0, 0, 21, 0, 0, 0, 0)),
        "of_another_device": disk(chain, shape=13, superblock=words(0, 0, 0, 0, 0, 1 << 32 | 2, 0, 0)),
        "two_caches": disk(chain, shape=15, how=1, superblock=words(0, 0, 0, 0, 0, 0, 77, 0)),
        "foreign": disk(chain, shape=8, superblock=bytes(range(64))),
        "foreign_reset": disk(chain, shape=8, how=4, superblock=bytes(range(64))),
    }


def config() -> dict[str, bytes]:
    flexkv = b"cpu_cache_gb: 1.5\nssd_cache_dir:\n  - /a\n  - /b\nuse_hugepage_cpu_buffer: true\nredis_host: x\n"
    return {
        "yaml": b"yaml\n\n" + flexkv + b"kv_cache_dtype: null\neviction_policy: lfu\n",
        "yml_block_and_flow": b"yml\n\n{cpu_cache_gb: 2, ssd_cache_dir: [/a, /b], server_log: >\n  /x\n  y\n}",
        "yaml_anchors": b"yaml\n\na: &a [1]\nb: *a\n<<: {c: 1}\n",
        "yaml_many_aliases": b"yaml\n\na: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nd: [*c,*c,*c]\n",
        "yaml_tags": b"yaml\n\nspin_us: !!int '5'\nchecksum: !!str on\n--- \nb: 1\n",
        "yaml_a_list": b"yaml\n\n- 1\n- 2\n",
        "yaml_empty": b"yaml\n\n",
        "yaml_deep": b"yaml\n\na: " + b"[" * 150 + b"]" * 150,
        "json": b'json\n\n{"ssd_cache_gb": 128, "iouring_entries": 0, "polling": "busy", "checksum": false}',
        "json_twice": b'json\n\n{"spin_us": 1, "spin_us": 2, "KVRING_SPIN_US": 3, "flexkv_flexkv_spin_us": 4}',
        "json_wrong_type": b'json\n\n{"spin_us": {"a": 1}}',
        "json_a_huge_number": b'json\n\n{"cpu_cache_gb": 1e999, "spin_us": 99999999999999999999999}',
        "json_escapes": b'json\n\n{"\\u0000": "\\ud83d\\ude00", "": 1}',
        "toml": b'toml\n\ncpu_cache_gb = 3\nssd_cache_dir = ["/a"]\nhugepages = "off"\nlease_ttl_ms = 1_000\n',
        "toml_dates_and_tables": b"toml\n\na = 1979-05-27T07:32:00Z\n[b.c]\nd = inf\n[[e]]\nf = nan\n",
        "toml_dotted": b"toml\n\n" + b".".join([b"a"] * 100) + b" = 1\n",
        "no_such_ending": b"ini\n\ncpu_cache_gb=1\n",
        "no_text": b"json\n\n\xff\xfe\x00",
        "env_flexkv": b"yaml\nFLEXKV_CPU_CACHE_GB=32\nFLEXKV_SSD_CACHE_DIR=/a;/b;;\nFLEXKV_MAX_FILE_SIZE_GB=-1\n"
        b"FLEXKV_ENABLE_MPS=1\nFLEXKV_LT_POOL_X=1\nFLEXKV_LOG_LEVEL=WARNING\nPATH=/bin\n\n",
        "env_kvring": b"yaml\nKVRING_SERVER_CPU=3\nKVRING_SPIN_US=1000000\nKVRING_LOAD_WAIT_MS=60000\n"
        b"KVRING_HUGEPAGE_SIZE_BYTES=1073741824\nKVRING_SERVER_BIN=none\nKVRING_FIXED_BUFFERS=off\n\n",
        "env_both_and_a_file": b"toml\nFLEXKV_CPU_CACHE_GB=1\nKVRING_CPU_CACHE_GB=2\n\ncpu_cache_gb = 3\n",
        "env_instances": b"yaml\nFLEXKV_INSTANCE_NUM=1024\nFLEXKV_INSTANCE_ID=1023\n\n",
        "env_too_few_instances": b"yaml\nKVRING_INSTANCE_ID=1\n\n",
        "env_unknown": b"yaml\nFLEXKV_CPU_CACHE_GBS=1\n\n",
        "env_no_name": b"yaml\nKVRING_=1\n\n",
        "env_tcp": b"yaml\nFLEXKV_SERVER_RECV_PORT=tcp://host:1\n\n",
        "env_socket": b"yaml\nFLEXKV_SERVER_RECV_PORT=ipc:///tmp/x\nKVRING_IOURING_ENTRIES=4096\n\n",
        "env_odd_numbers": b"yaml\nKVRING_CPU_CACHE_GB=1e-300\nKVRING_MAX_FILE_SIZE_GB=-inf\n"
        b"KVRING_SSD_CACHE_GB=+0x1\n\n",
        "env_spaces": b"yaml\nKVRING_SPIN_US= 7 \nKVRING_EVICTION_POLICY= S3FIFO\n\n",
    }


def request(op: int, count: int = 0, first: int = 0, arena: int = 0, lease: bytes = b"\0\0", **more: int) -> bytes:
    said = struct.pack("<BBHHB", 1, op, count, first, arena)
    return said + lease + bytes([more.get("target", 0), more.get("parent", 0)])


def keys(*names: int, arena: int = 0) -> bytes:
    return bytes([3, arena, *names, *[0] * (16 - len(names))])


def store_what_is_another_s(kind: int) -> bytes:
    return struct.pack("<BBHBB", 0, 3, 0, kind, 0)


def store(area: int, index: int, value: int) -> bytes:
    return struct.pack("<BBHBQ", 0, area, index, 3, value)


def ring_entries() -> dict[str, bytes]:
    plain, ranks, disk = bytes([0, 0x77, 0, 0]), bytes([1, 0x77, 0, 0]), bytes([6, 0x22, 0, 0])
    faulty = bytes([4, 0x22, 0x3F, 0])
    take, switch, reset, ping, sleep = bytes([7]), bytes([12]), bytes([13]), bytes([16]), bytes([14])
    poll = bytes([5, 0])
    last, grants = b"\x04\0", bytes([4, 0, 0, 8])
    after = poll + take

    def wait(us: int) -> bytes:
        return struct.pack("<BH", 6, us) + poll

    def honest_store(blocks: int) -> bytes:
        return bytes([8, blocks - 1, 15])

    def honest_load(blocks: int) -> bytes:
        return bytes([9, blocks - 1])

    def end(how: int) -> bytes:
        return bytes([11, how])

    stored = keys(1, 2, 3, 4) + request(RESERVE, 4) + after + grants + request(COMMIT, 4) + after
    leased = stored + request(MATCH, 4) + after
    loaded = leased + request(LOAD, 4, lease=last) + after
    honest = honest_store(6) + honest_load(6)
    settle = bytes([5, 15]) * 4
    others = b"".join(
        keys(*range(first, first + 4)) + request(RESERVE, 4) + after + grants + request(COMMIT, 4) + after + settle
        for first in (16, 32, 48)
    )
    return {
        "nothing": plain,
        "honest_alone": plain + honest + ping,
        "honest_on_a_disk": disk + honest_store(3) + settle + honest_store(6) + settle + honest,
        "stores": plain + stored + honest,
        "loads": plain + loaded + honest + request(RELEASE, lease=last) + after,
        "two_ranks": ranks
        + keys(1, 2)
        + (request(RESERVE, 2) + after + grants + request(COMMIT, 2) + switch) * 2
        + honest,
        "one_rank_only": ranks + stored + wait(20000) * 3 + honest,
        "prefetches": disk + leased + others + request(PREFETCH, 4, lease=last) + settle + honest,
        "loads_from_a_disk": disk + leased + settle + others + request(LOAD, 4, lease=last) + settle + take + honest,
        "cancels": disk + leased + others + request(LOAD, 4, lease=last, target=9) + request(CANCEL, target=9) + settle,
        "faults": faulty + leased + others + request(LOAD, 4, lease=last) + settle + take + honest,
        "aborts": plain + keys(1, 2) + request(RESERVE, 2) + after + grants + request(ABORT, 2) + after + honest,
        "commits_twice": plain + stored + request(COMMIT, 4) + request(ABORT, 4) + after + honest,
        "one_key_twice": plain + keys(1, 1, 2, 2) + request(RESERVE, 4) + after + grants + request(COMMIT, 4) + after,
        "a_child_of_itself": plain
        + keys(1)
        + request(RESERVE, 1, 1, parent=1)
        + after
        + stored
        + request(RESERVE, 1, 4, parent=4),
        "a_second_branch": plain
        + stored
        + keys(1, 9, 8)
        + request(RESERVE, 3)
        + after
        + grants
        + request(COMMIT, 2)
        + after,
        "the_honest_client_s_keys": plain
        + keys(0xF0, 0xF1, 0xF2)
        + request(RESERVE, 3)
        + after
        + honest_store(6)
        + honest_load(6),
        "hoards": plain + b"".join(keys(n) + request(RESERVE, 1) + poll for n in range(20)) + honest,
        "dies_while_it_stores": plain
        + keys(1, 2, 3)
        + request(RESERVE, 3)
        + poll
        + end(2)
        + honest
        + wait(3000)
        + honest,
        "hangs_up_while_it_stores": plain
        + keys(1, 2, 3)
        + request(RESERVE, 3)
        + poll
        + end(1)
        + honest
        + wait(3000)
        + honest,
        "goodbye_while_it_loads": disk
        + leased
        + others
        + request(LOAD, 4, lease=last)
        + poll
        + end(0)
        + settle
        + honest,
        "lets_leases_expire": plain + loaded + honest + wait(20000) + request(LOAD, 4, lease=last) + after + honest,
        "reset_between": disk + leased + honest + reset + request(LOAD, 4, lease=last) + after + settle + honest,
        "reset_while_it_stores": disk
        + keys(1, 2)
        + request(RESERVE, 2)
        + after
        + reset
        + grants
        + request(COMMIT, 2)
        + settle
        + honest,
        "takes_another_s_grant": plain + bytes([8, 1]) + store_what_is_another_s(7) + request(COMMIT, 1) + honest,
        "ends_another_s_store": plain + bytes([8, 1]) + store_what_is_another_s(7) + request(ABORT, 1) + honest,
        "takes_another_s_lease": plain + honest + request(RELEASE, lease=b"\x06\0") + poll + others + honest,
        "dies_while_both_store": ranks + bytes([8, 5]) + keys(1, 2) + request(RESERVE, 2) + poll + end(2) + honest,
        "reset_while_the_honest_one_stores": disk + bytes([8, 5]) + reset + poll + honest,
        "a_tail_beyond_all": plain + store(0, 0, 5000) + poll + honest,
        "a_tail_that_goes_back": plain + request(PING) * 3 + poll + store(0, 0, 1) + poll + honest,
        "a_head_that_was_never_published": plain + store(0, 24, 77) + request(PING) + poll + honest,
        "answers_never_taken": plain + store(0, 0, 1024) + bytes([5, 15]) * 4 + honest,
        "a_state_of_its_own": plain
        + store(0, 48, 1)
        + store(0, 32, 1)
        + store(0, 40, 1)
        + request(PING)
        + poll
        + sleep
        + honest,
        "entries_of_anything": plain + (bytes([2]) + bytes([9, 7]) * 8 + b"\x02") * 3 + poll + honest,
        "poisoned_while_it_stores": disk
        + keys(1, 2)
        + request(RESERVE, 2)
        + poll
        + store(0, 0, 5000)
        + poll
        + honest
        + end(0)
        + wait(3000),
        "spans_at_the_arena_s_end": plain
        + store(1, 2, ARENA_BYTES - 16)
        + request(RESERVE, 1, arena=255)
        + after
        + honest,
    }


if __name__ == "__main__":
    for target in (wire, handshake, superblock_and_headers, slot_table, config, ring_entries):
        save(target.__name__, target())
