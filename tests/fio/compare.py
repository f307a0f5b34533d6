"""The same job file through fio and through `kvring bench device`, alternating, and what the two say side by side.

    python3 tests/fio/compare.py [--kvring PATH] [--rounds N] JOBFILE [--dir DIRECTORY]

Both reports are read by the same code: kvring's JSON has fio's schema. kvring's buffers are on hugepages (transparent
ones); fio's are with --iomem=mmaphuge and enough of them reserved. Without that fio is at a disadvantage where blocks
are big: on 4 KiB pages a transfer of 1 MiB has 256 pieces. Ends with status 1 if a promise does not hold: within 3 % of
fio's bandwidth and IOPS or better, at equal or lower CPU time an I/O. Few rounds on a busy machine say little.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# What is promised: bandwidth and IOPS within 3 % of fio's or better, at equal or lower CPU time an I/O.
HOLDS = {
    "GB/s": lambda ratio: ratio >= 0.97,
    "kIOPS": lambda ratio: ratio >= 0.97,
    "CPU us/IO": lambda ratio: ratio <= 1.0,
}


def run(command: list[str], directory: Path) -> list[dict]:
    output = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if output.returncode != 0:
        sys.exit(f"{' '.join(command)}: {output.stderr or output.stdout}")
    # fio may say something before its report.
    return json.loads(output.stdout[output.stdout.index("{") :])["jobs"]


def figures(job: dict) -> dict[str, float]:
    sides = [job["read"], job["write"]]
    ios = sum(side["total_ios"] for side in sides)
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    busy = max(sides, key=lambda side: side["total_ios"])
    return {
        "GB/s": sum(side["bw_bytes"] for side in sides) / 1e9,
        "kIOPS": sum(side["iops"] for side in sides) / 1e3,
        "p50 us": busy["clat_ns"]["percentile"]["50.000000"] / 1e3,
        "p99 us": busy["clat_ns"]["percentile"]["99.000000"] / 1e3,
        "CPU us/IO": cpu_s * 1e6 / max(ios, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobfile", type=Path)
    parser.add_argument("--kvring", default="kvring")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=Path("."))
    parser.add_argument("--iomem", default="mmap", help="fio's memory: mmap, or mmaphuge where hugepages are reserved")
    said = parser.parse_args()
    job_file = said.jobfile.resolve()
    program = shutil.which(said.kvring)
    if program is None:
        sys.exit(f"--kvring {said.kvring}: no such program: say where it is, or `cargo build --release`")
    kvring = [str(Path(program).resolve()), "bench", "device", str(job_file), "--output-format", "json"]
    # The same jobs, with the one key that only fio needs.
    for_fio = tempfile.NamedTemporaryFile("w", suffix=".fio")
    for_fio.write(job_file.read_text().replace("[global]", f"[global]\niomem={said.iomem}", 1))
    for_fio.flush()
    fio = ["fio", "--output-format=json", for_fio.name]
    seen: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(said.rounds):
        order = [("fio", fio), ("kvring", kvring)]
        for name, command in order if number % 2 == 0 else reversed(order):
            for job in run(command, said.dir):
                seen.setdefault(job["jobname"], {}).setdefault(name, []).append(figures(job))
            print(f"round {number + 1} of {said.rounds}: {name} done", file=sys.stderr)
    missed = 0
    header = f"{'job':<16} {'':<10} {'kvring':>10} {'fio':>10} {'ratio':>7}  {'':<12}"
    print(f"{header}   (medians of {said.rounds} rounds; ratio by round)")
    for job, both in seen.items():
        for what in both["fio"][0]:
            ours, theirs = ([row[what] for row in both[name]] for name in ("kvring", "fio"))
            ratio = statistics.median(a / b if b else float("nan") for a, b in zip(ours, theirs))
            middle = f"{statistics.median(ours):>10.3f} {statistics.median(theirs):>10.3f}"
            holds = HOLDS.get(what, lambda ratio: None)(ratio)
            verdict = {True: "holds", False: "does not hold", None: ""}[holds]
            missed += holds is False
            print(f"{job:<16} {what:<10} {middle} {ratio:>7.3f}  {verdict}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
