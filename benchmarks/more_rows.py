r"""The effect of more rows: acceptance length against training tokens, on the quickstart's verifier.

    pip install reasoning-gym
    python benchmarks/more_rows.py --folder FOLDER

Draws problems that are not among the quickstart's, lets its verifier answer them, and trains the quickstart's recipe on
the first 500, 1,000, ... rows for equal numbers of steps. All are validated on the quickstart's validation rows. Prints
a Markdown table; existing files in FOLDER are not written again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

QUICKSTART = Path("configs/quickstart")
SEED = 201  # far from those of the quickstart's rows


def main() -> None:
    """Write rows, train on each share of them, and print the table."""
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / "rows.jsonl"
    if not source.exists():
        write_rows(source, max(arguments.rows))
    print("| rows | response tokens | steps | epochs | acceptance length |\n|---|---|---|---|---|", flush=True)
    for rows in arguments.rows:
        share = first_rows(source, rows)
        tokens = sum(sum(json.loads(line)["loss_mask"]) for line in share.open(encoding="utf-8"))
        for steps in arguments.steps:
            length, epochs = train(share, steps, arguments.folder / f"rows-{rows}-steps-{steps}.log")
            print(f"| {rows:,} | {tokens:,} | {steps:,} | {epochs:.1f} | {length:.3f} |", flush=True)


def write_rows(path: Path, number: int) -> None:
    """Let the verifier answer problems; a few more are drawn, since responses cut at the limit are omitted."""
    sys.path.insert(0, str(QUICKSTART))
    from problems import generate, write_prompts

    own = [json.loads(line) for name in ("train", "validation") for line in (QUICKSTART / f"{name}.jsonl").open()]
    problems = generate(number + number // 50, SEED, exclude={row["messages"][0]["content"] for row in own})
    prompts, output = path.with_name("prompts.jsonl"), path.with_name("responses")
    write_prompts(problems, prompts)
    words = ["prepare", "responses", str(prompts), "--verifier", str(QUICKSTART / "verifier")]
    specforge(*words, "--max_new_tokens", "96", "--batch_size", "256", "--output", str(output))
    stop = AutoTokenizer.from_pretrained(QUICKSTART / "verifier").eos_token_id
    with (output / "responses.jsonl").open(encoding="utf-8") as rows:
        path.write_text("".join(row for row in rows if json.loads(row)["input_ids"][-1] == stop), encoding="utf-8")


def first_rows(source: Path, number: int) -> Path:
    """Write the first rows of a file to a new file."""
    path = source.with_name(f"rows-{number}.jsonl")
    with source.open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, number)), encoding="utf-8")
    return path


def train(rows: Path, steps: int, log: Path) -> tuple[float, float]:
    """Train the quickstart's recipe; return the best acceptance length and the number of epochs."""
    if not log.exists():
        shown = specforge(
            *("fit", "--config", "configs/quickstart.yaml"),
            *("--data.train", str(rows), "--output_dir", str(log.with_suffix("")), "--trainer.max_epochs", "-1"),
            *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps // 4)),
            *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
        )
        log.write_text(shown, encoding="utf-8")
    shown = log.read_text(encoding="utf-8")
    lengths = [float(length) for length in re.findall(r"acceptance_length (\d\.\d+)", shown)]
    batches = int(re.findall(r"an epoch has ([\d,]+) batches", shown)[0].replace(",", ""))
    return max(lengths), steps / batches


def specforge(*words: str) -> str:
    """Run a command and return its output."""
    command = [sys.executable, "-m", "specforge", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for rows and runs")
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 1000, 1980, 10000, 40000])
    parser.add_argument("--steps", type=int, nargs="+", default=[520, 1300])
    return parser.parse_args()


if __name__ == "__main__":
    main()
