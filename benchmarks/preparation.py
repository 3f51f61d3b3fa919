r"""The speed of `specforge prepare rows`, and its memory, which must not grow with the source.

    python benchmarks/preparation.py --verifier VERIFIER --rows 10000 100000 --workers 2

Writes synthetic ShareGPT chats, prepares each set in a separate process, and prints a Markdown table: wall time,
processor time of all processes, and the peak memory of the parent and of the largest worker: private memory (RssAnon)
and all resident memory (VmHWM), which includes mapped files.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS = 20_000
SYLLABLES = [first + vowel + last for first in "bdfglmnprst" for vowel in "aeiou" for last in ("", "n", "r", "s", "t")]


def chats(number: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield chats of one to four rounds; words follow Zipf's law, replies are about five times as long as questions."""
    generator = np.random.default_rng(seed)
    words = np.array(["".join(generator.choice(SYLLABLES, generator.integers(1, 4))) for _ in range(WORDS)])
    chances = 1 / np.arange(1, WORDS + 1)
    cumulative = np.cumsum(chances / chances.sum())

    def text(mean: float) -> str:
        length = 3 + int(generator.exponential(mean))
        return " ".join(words[np.minimum(cumulative.searchsorted(generator.random(length)), WORDS - 1)])

    for index in range(number):
        turns = []
        for _ in range(generator.integers(1, 5)):
            turns += [{"from": "human", "value": text(20)}, {"from": "gpt", "value": text(100)}]
        yield {"id": f"synthetic-{index}", "conversations": turns}


def watch(process: subprocess.Popen[bytes]) -> tuple[dict[int, dict[str, int]], float]:
    """Return the peak memory of a process and its children in KiB, by process id, and the seconds until its end."""
    peaks: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    begin = time.monotonic()
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, children)]:
            for name, value in memory(pid).items():
                peaks[pid][name] = max(peaks[pid][name], value)
        time.sleep(0.1)
    return peaks, time.monotonic() - begin


def memory(pid: int) -> dict[str, int]:
    """Return a process's memory in KiB, as reported by the kernel; nothing if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if name in FIELDS}


FIELDS = ("RssAnon", "VmHWM")


def main() -> None:
    """Measure each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| rows | source | tokens | wall | processor | rows/s | again | parent, own (all) | worker, own (all) |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(Path(folder), number, arguments), flush=True)


def measure(folder: Path, number: int, arguments: argparse.Namespace) -> str:
    """Prepare a number of rows; return a line of the table."""
    source = folder / "chats.jsonl"
    with source.open("w") as file:
        for chat in chats(number, arguments.seed):
            file.write(json.dumps(chat) + "\n")
    command = [sys.executable, "-m", "specforge", "prepare", "rows", str(source), "--verifier", arguments.verifier]
    command += ["--output", str(folder / "rows"), "--workers", str(arguments.workers)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks, wall = watch(process)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(process.returncode)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    begin = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    again = time.monotonic() - begin
    splits = json.loads((folder / "rows" / "summary.json").read_text())["splits"].values()
    tokens = sum(split["tokens"] for split in splits)
    parent = peaks.pop(process.pid)
    workers = {name: max((peak[name] for peak in peaks.values()), default=0) for name in FIELDS}
    sizes = " | ".join(f"{peak['RssAnon'] / 1024:.0f} ({peak['VmHWM'] / 1024:.0f}) MiB" for peak in (parent, workers))
    return (
        f"| {number:,} | {source.stat().st_size / 2**20:.0f} MiB | {tokens / 1e6:.1f} M | {wall:.0f} s | "
        f"{processor:.0f} s | {number / wall:,.0f} | {again:.1f} s | {sizes} |"
    )


if __name__ == "__main__":
    main()
