r"""The quickstart from end to end: the time training waits for data, and the overhead of the decoding loop.

    python benchmarks/quickstart.py

Trains it twice, with a live verifier and from stored states, and reads the logged throughput and ``train/idle_share``,
the median over the logged intervals; then decodes with the draft and takes the loop's time per round from ``specforge
evaluate``.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specforge.__main__ import main as specforge
from specforge.evaluation.results import Results

CONFIG = "configs/quickstart.yaml"
PROMPTS = "configs/quickstart/validation.jsonl"
PROPOSALS = ("greedy:speculative_tokens=5", "dynamic_tree:depth=5,speculative_tokens=24,expansion_factor=6")


def main() -> None:
    """Train, decode, and print both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("prepare", "features", "--config", CONFIG, "--output", f"{folder}/features")
        print("| states of the verifier | tokens/s | share of time waiting for data | maximum |\n|---|---|---|---|")
        for states, given in (("live", "live"), ("stored", f"{folder}/features")):
            output = folder / states.replace(" ", "-")
            run("fit", "--config", CONFIG, "--data.features", given, "--output_dir", str(output))
            print(idle_row(states, output / "version_0"), flush=True)
        draft = folder / "stored" / "version_0"
        print("\n| temperature | proposal | draft | verifier | loop | loop / verifier |\n|---|---|---|---|---|---|")
        for temperature in ("0", "1"):
            report = folder / f"report-{temperature}"
            sets = ("--prompts", PROMPTS, "--limit", "32", "--max_new_tokens", "64", "--temperature", temperature)
            run("evaluate", str(draft), *sets, "--output", str(report), "--baselines", "--proposal", *PROPOSALS)
            results = Results.model_validate_json((report / "results.json").read_text())
            for contender in results.contenders:
                measured = contender.all_sets
                share = measured.other_milliseconds / measured.verifier_milliseconds
                print(
                    f"| {temperature} | {contender.name} | {measured.draft_milliseconds:.2f} ms | "
                    f"{measured.verifier_milliseconds:.2f} ms | {measured.other_milliseconds:.2f} ms | {share:.1%} |",
                    flush=True,
                )


def run(*arguments: str) -> None:
    """Run a command of specforge; its output is not printed among the tables."""
    with contextlib.redirect_stdout(sys.stderr):
        assert specforge(list(arguments)) == 0


def idle_row(states: str, folder: Path) -> str:
    """Return a line of the table about a run."""
    events = EventAccumulator(str(folder)).Reload()
    speed, idle = (
        [event.value for event in events.Scalars(f"train/{tag}")] for tag in ("tokens_per_second", "idle_share")
    )
    return f"| {states} | {statistics.median(speed):,.0f} | {statistics.median(idle):.2%} | {max(idle):.2%} |"


if __name__ == "__main__":
    main()
