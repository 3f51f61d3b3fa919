"""Measuring drafts: by exact replay of the verifier's own text, and by decoding its prompts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from specforge import SpeculatorModel
from specforge.__main__ import main as specforge
from specforge.data.rows.reading import TokenRows
from specforge.decoding.recorded import chain_acceptance
from specforge.decoding.replay import AcceptanceLength, find_turns
from specforge.evaluation.results import Results
from specforge.sampling import Sampling
from specforge.verifier.features import Features, capture
from specforge.verifier.parts import VerifierParts

# Number of responses decoded in a batch.
BATCH = 32
SHAPES = {"chain": "greedy:speculative_tokens={chain}", "tree": "dynamic_tree:depth={chain}"}


@torch.no_grad()
def replayed(drafts: Sequence[Path], verifier: PreTrainedModel, rows: TokenRows, chain: int) -> list[dict[str, float]]:
    """Replay decoding by greedy chains at temperature 0.

    Args:
        drafts: Folders of the drafts.
        verifier: The verifier.
        rows: Its responses at temperature 0.
        chain: Length of the chains.

    Returns:
        For each draft, the figures of ``specforge.decoding.replay.figures``.
    """
    models = [SpeculatorModel.from_pretrained(draft, verifier=verifier) for draft in drafts]
    metrics = [AcceptanceLength(chain) for _ in models]
    parts = VerifierParts.of(verifier)
    for index in range(len(rows)):
        row = rows[index]
        positions = torch.arange(len(row["input_ids"]))[None]
        # All drafts of a comparison read the same layers.
        features = capture(verifier, row["input_ids"][None], positions, models[0].aux_layers)
        for begin, length in zip(*(bounds.tolist() for bounds in find_turns(row["loss_mask"][None])), strict=True):
            end = begin + length
            text, seen = row["input_ids"][:end], Features(features.aux[:, :end], features.last[:, :end])
            for model, metric in zip(models, metrics, strict=True):
                # There is no state before a row's first token, so a draft cannot start there.
                accepted, _ = chain_acceptance(model, parts, text, seen, max(begin, 1), chain, Sampling())
                metric.update(accepted[:, None], torch.ones(1, accepted.shape[1], dtype=torch.bool))
    return [metric.compute()[chain] for metric in metrics]


def decoded(
    drafts: Sequence[Path],
    verifier: str,
    sets: Sequence[str],
    shapes: Sequence[str],
    temperature: float,
    limit: int | None,
    output: Path,
) -> Results:
    """Decode the prompts of the sets with ``specforge evaluate``.

    Args:
        drafts: Folders of the drafts.
        verifier: Folder or hub id of the verifier.
        sets: Files of prompts.
        shapes: Proposal methods with their settings.
        temperature: Temperature of the verifier.
        limit: Prompts of each set; None for all.
        output: Folder of the report.
    """
    words = ["evaluate", *map(str, drafts), "--verifier", verifier, "--prompts", *sets, "--proposal", *shapes]
    words += ["--baselines", "--temperature", str(temperature), "--batch_size", str(BATCH), "--output", str(output)]
    words += [] if limit is None else ["--limit", str(limit)]
    print(f"specforge {' '.join(words)}", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        assert specforge(words) == 0
    return Results.read(output / "results.json")
