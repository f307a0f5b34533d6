"""Pages of `kvring report` in a real browser: nothing on its console, every plot whole, no text on another or cut off.

    python3 tests/report/browser.py [--kvring PATH] [--screenshot FILE.png] [RUN.json [RUN.json]]

Without runs it makes some: two of a workload, which are compared, one of the rings, one of jobs on a simulated device.
With --screenshot the first page is saved as a picture, all of its length. Debian's chromium, headless; where it is not
installed this says so and ends well. A copy of the page carries a script that looks at what was laid out and leaves
what it found in the page, which chromium prints: the page itself has no script.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Of a desk, and of half of one.
WIDTHS = [1100, 640]

LOOK = """
<script>
"use strict";
const found = [];
const page = document.documentElement;
const name = (element) => element.tagName.toLowerCase() + " " + JSON.stringify(element.textContent.trim().slice(0, 40));
if (page.scrollWidth > page.clientWidth) {
  found.push(`the page is ${page.scrollWidth} wide, and ${page.clientWidth} are seen`);
}
for (const element of document.body.querySelectorAll("*")) {
  const box = element.getBoundingClientRect();
  if (!element.closest("svg") && (box.left < -1 || box.right > page.clientWidth + 1)) {
    found.push(`${name(element)} ends at ${box.right.toFixed(0)} of ${page.clientWidth}`);
  }
}
const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
const plots = [...document.querySelectorAll("svg")];
for (const [index, plot] of plots.entries()) {
  const box = plot.getBoundingClientRect();
  const what = `plot ${index + 1}`;
  if (box.width < 100 || box.height < 50) found.push(`${what} is ${box.width} by ${box.height}`);
  const lines = [...plot.querySelectorAll("polyline, path")].map((line) => line.getBoundingClientRect());
  // A line that is drawn has a length: of axes and of the legend alone there are short ones only.
  if (!lines.some((line) => line.width > box.width / 10)) found.push(`${what} is empty`);
  const texts = [...plot.querySelectorAll("text")].map((text) => [text, text.getBoundingClientRect()]);
  if (texts.length < 4) found.push(`${what} has ${texts.length} texts`);
  for (const [at, [text, inner]] of texts.entries()) {
    if (inner.left < box.left - 1 || inner.right > box.right + 1 || inner.top < box.top - 1
      || inner.bottom > box.bottom + 1) {
      found.push(`${what}: ${name(text)} is cut off`);
    }
    for (const [other, outer] of texts.slice(at + 1)) {
      if (over(inner, outer)) found.push(`${what}: ${name(text)} and ${name(other)} lie over one another`);
    }
  }
}
const cells = [...document.querySelectorAll("td, th, p, h1, h2")];
for (const cell of cells) {
  if (cell.scrollWidth > cell.clientWidth + 1 && cell.clientWidth > 0) found.push(`${name(cell)} is cut off`);
}
const seen = {found, plots: plots.length, height: page.scrollHeight};
const told = document.createElement("pre");
told.id = "seen";
told.textContent = JSON.stringify(seen);
document.body.append(told);
</script>
"""


def chromium(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    # As root there is no sandbox; nothing is asked of the network.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--no-first-run", "--disable-background-networking", "--enable-logging=stderr", "--log-level=0"]
    command = ["chromium", *flags, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def look(page: Path, width: int, place: Path) -> dict[str, Any]:
    """What a browser of this width shows of a page."""
    copy = place / "looked-at.html"
    text = page.read_text()
    assert "<script" not in text, f"{page}: a page has no script of its own"
    copy.write_text(text.replace("</body>", LOOK + "</body>"))
    said = chromium(f"--window-size={width},900", "--dump-dom", copy.as_uri(), profile=place / "profile")
    told = re.search(r'<pre id="seen">(.*?)</pre>', said.stdout, re.DOTALL)
    if told is None:
        sys.exit(f"{page}: chromium has not laid it out: {said.stderr[-2000:]}")
    seen: dict[str, Any] = json.loads(html.unescape(told[1]))
    seen["found"] += [line for line in said.stderr.splitlines() if ":CONSOLE" in line]
    return seen


def picture(page: Path, height: int, file: Path, place: Path) -> None:
    said = chromium(
        f"--window-size={WIDTHS[0]},{height}", f"--screenshot={file}", page.as_uri(), profile=place / "profile"
    )
    if not file.is_file():
        sys.exit(f"{file}: chromium has made no picture: {said.stderr[-2000:]}")


def made(kvring: Path, place: Path) -> list[list[Path]]:
    """Runs, small ones: each list is a page's."""

    def run(name: str, *arguments: str) -> Path:
        output = place / name
        command = [str(kvring), "bench", *arguments, "--output", str(output)]
        said = subprocess.run(command, cwd=place, capture_output=True, text=True)
        if said.returncode != 0:
            sys.exit(f"{' '.join(command)}: {said.stderr or said.stdout}")
        return output

    def cache(name: str, policy: str) -> Path:
        sizes = ["--cpu-cache-gb", "0.0625", "--ssd-cache-gb", "0.25", "--block-kib", "64"]
        return run(name, "cache", "chat", "--requests", "400", "--rate", "200", "--policy", policy, *sizes)

    jobs = ["device", "--ioengine=sim", "--size=16m", "--rw=randrw", "--output-format=json"]
    return [
        [cache("lru.json", "lru"), cache("fifo.json", "fifo")],
        [run("ring.json", "ring", "--seconds", "0.2")],
        [run("jobs.json", *jobs)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="one saved run, or two to be compared")
    parser.add_argument("--kvring", type=Path, default=Path("target/release/kvring"))
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="where the first page's picture goes")
    said = parser.parse_args()
    if shutil.which("chromium") is None:
        print("skipped: no chromium here (Debian: apt-get install chromium)")
        return
    kvring = said.kvring.resolve()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="kvring-report-") as directory:
        place = Path(directory)
        pages = [[run.resolve() for run in said.runs]] if said.runs else made(kvring, place)
        for number, runs in enumerate(pages):
            page = place / f"page{number}.html"
            # As a person would: in the directory where the runs lie, by their names.
            names = [run.name if run.parent == runs[0].parent else str(run) for run in runs]
            command = [str(kvring), "report", "--output", str(page), *names]
            subprocess.run(command, cwd=runs[0].parent, check=True, capture_output=True)
            for width in WIDTHS:
                seen = look(page, width, place)
                if seen["plots"] == 0:
                    seen["found"].append("no plot at all")
                for found in seen["found"]:
                    print(f"{' and '.join(names)}, {width} wide: {found}")
                bad += len(seen["found"])
                if number == 0 and width == WIDTHS[0] and said.screenshot is not None:
                    picture(page, seen["height"], said.screenshot.resolve(), place)
            print(f"{' and '.join(names)}: {seen['plots']} plots, looked at {' and '.join(map(str, WIDTHS))} wide")
    if bad:
        sys.exit(f"{bad} things are wrong with what is shown")


if __name__ == "__main__":
    main()
