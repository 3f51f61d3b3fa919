r"""Peak memory of training by row length: is the growth linear or quadratic?

    python benchmarks/long_context.py --lengths 1024 2048 4096 8192

Each figure is the growth of a fresh process's peak resident memory over one step on one row, by `specforge fit`: the
verifier's pass, the draft's steps, losses, gradients and update. A row is one document, or documents of 512 tokens.
For comparison, only the verifier's pass is measured, also with masks, as transformers runs it. The verifier is random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RECIPES: dict[str, dict[str, Any]] = {
    "EAGLE-3": {"algorithm": "eagle3", "model": {"ttt_steps": 5, "draft": {"draft_vocab_size": 512}}},
    "EAGLE-3, checkpointing": {
        "algorithm": "eagle3",
        "model": {"ttt_steps": 5, "draft": {"draft_vocab_size": 512}, "activation_checkpointing": True},
    },
    "HASS": {"algorithm": "eagle", "model": {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}}},
    "MLP": {"algorithm": "mlp", "model": {"draft": {"num_layers": 3}}},
}
PASS, PASS_WITH_MASKS = "the verifier's pass", "the verifier's pass, with masks"
DOCUMENT = 512
VOCABULARY = 16_384


def main() -> None:
    """Measure every combination and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="Tokens of the row.")
    names = [PASS_WITH_MASKS, PASS, *RECIPES]
    parser.add_argument("--measure", nargs="+", choices=names, default=names, help="What to measure.")
    arguments = parser.parse_args()
    lengths = sorted(arguments.lengths)
    print(
        "| what | row | "
        + " | ".join(f"{length:,}" for length in lengths)
        + " | fit: per token | fit: share of the square |"
    )
    print("|---|---|" + "---|" * (len(lengths) + 2))
    for name in arguments.measure:
        for document in (None, DOCUMENT):
            row = "one document" if document is None else f"documents of {document}"
            grown = [peak_growth(name, length, document or length) for length in lengths]
            token, square = fit(lengths, grown)
            figures = " | ".join(f"{growth:,.0f} MiB" for growth in grown)
            print(f"| {name} | {row} | {figures} | {token * 1024:,.0f} KiB | {square:.0%} |", flush=True)


def fit(lengths: list[int], grown: list[float]) -> tuple[float, float]:
    """Fit a constant, a linear and a quadratic part; return MiB per token and the last's share at the longest row."""
    terms = np.array([[1.0, length, length**2] for length in lengths])
    (_, token, square), *_ = np.linalg.lstsq(terms, np.array(grown), rcond=None)
    return float(token), float(square * lengths[-1] ** 2 / grown[-1])


def peak_growth(name: str, length: int, document: int) -> float:
    """Measure the growth of peak memory in a separate process, in MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool, tempfile.TemporaryDirectory() as folder:
        return float(pool.apply(measure, (name, length, document, Path(folder))))


def measure(name: str, length: int, document: int, folder: Path) -> float:
    """Return the growth of this process's peak memory over a step or a verifier forward pass, in MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from specforge.__main__ import main
    from specforge.training.cli.command_line import TrainingCLI  # noqa: F401  (what is imported is not counted)
    from specforge.verifier.features import capture
    from specforge.verifier.loading import load_verifier

    torch.set_num_threads(1)
    logging.disable()
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY)).save_pretrained(folder)
    rows = torch.randint(5, VOCABULARY, (length // document, document))
    if name not in RECIPES:
        verifier = load_verifier(str(folder))
        if name == PASS_WITH_MASKS:
            verifier.set_attn_implementation("sdpa")
        positions = torch.arange(document).repeat(len(rows))[None]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        capture(verifier, rows.view(1, -1), positions, [2, 4, 5])
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    mask = [0, 0] + [1] * (document - 2)
    lines = [json.dumps({"input_ids": row, "loss_mask": mask}) + "\n" for row in rows.tolist()]
    (folder / "rows.jsonl").write_text("".join(lines))
    trainer = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False}
    data = {"train": str(folder / "rows.jsonl"), "validation_share": 0, "max_length": length}
    values = {"verifier": str(folder), "output_dir": str(folder / "runs"), "trainer": trainer, **RECIPES[name]}
    values["data"] = {**data, "cache_dir": str(folder / "cache")}
    (folder / "run.json").write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        assert main(["fit", "--config", str(folder / "run.json")]) == 0
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
