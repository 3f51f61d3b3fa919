"""``specforge plugins check``: run an algorithm on a tiny random verifier, from two training steps to decoding."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specforge.commands.plugin_proposals import decoding, proposing
from specforge.commands.plugin_trial import LENGTH, VOCABULARY, Trial, difference, write_verifier
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed
from specforge.training.module import DraftModule
from specforge.verifier.features import Features

TREES = {"static_tree", "dynamic_tree"}


def check_algorithm(name: str, settings: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Check an algorithm; yield the name of each check with its fault, or None.

    Args:
        name: The algorithm.
        settings: Further arguments for ``specforge fit``.

    Raises:
        UsageError: The algorithm does not exist, or its plugin does not train it.
    """
    algorithm = installed().find(Algorithm, name)
    if algorithm.module is None or algorithm.data is None:
        raise UsageError(f"the algorithm {name!r} can be loaded, but its plugin does not train it: nothing to check")
    with tempfile.TemporaryDirectory(prefix="specforge-check-") as temporary:
        folder = Path(temporary)
        verifier = write_verifier(folder / "verifier")
        fault = train(name, folder, settings)
        yield "two steps of training, validation, a checkpoint", fault
        if fault is not None:
            return
        try:
            draft = SpeculatorModel.from_pretrained(folder / "run" / "draft").cast(torch.float64)
            draft.attach_verifier(verifier)
        except Exception as error:  # of the plugin's own code, which may fail in any way
            yield "the checkpoint is read", _described(error)
            return
        trial = Trial(algorithm, draft.eval(), verifier, torch.arange(LENGTH) * 37 % 1000 + 3)
        checks: dict[str, Callable[[Trial], str | None]] = {
            "the checkpoint is read back unchanged": partial(reading, folder=folder),
            "shapes of states and logits": shapes,
            "logits are those that training computes": trained_logits,
            "the drafter agrees with unroll": drafting,
            "rows do not read later tokens": causality,
        }
        for method in algorithm.proposals:
            checks[f"{method}: the proposal is a tree"] = partial(proposing, method=method)
            checks[f"{method}: the text is the verifier's own"] = partial(decoding, method=method)
        for what, check in checks.items():
            try:
                yield what, check(trial)
            except Exception as error:  # of the plugin's own code, which may fail in any way
                yield what, _described(error)


def train(name: str, folder: Path, settings: Sequence[str]) -> str | None:
    """Run two optimizer steps and a validation, as a user would; return the end of the error output if that fails."""
    numbers = torch.arange(8 * 32).view(8, 32) * 31 % 1000 + 3
    rows = [json.dumps({"input_ids": one.tolist(), "loss_mask": [0] * 8 + [1] * 24}) for one in numbers]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = [
        *("--algorithm", name, "--verifier", str(folder / "verifier"), "--output_dir", str(folder)),
        *("--run_name", "run", "--data.train", str(folder / "rows.jsonl")),
        *("--data.validation", str(folder / "rows.jsonl"), "--data.max_length", "64", "--trainer.max_steps", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"),
        *("--trainer.enable_progress_bar", "false", "--data.cache_dir", str(folder / "cache")),
    ]
    command = [sys.executable, "-m", "specforge", "fit", *words, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else "\n".join(done.stderr.strip().splitlines()[-8:])


def reading(trial: Trial, folder: Path) -> str | None:
    """Return a fault if a draft changes when it is written and read, or is stored under another algorithm."""
    first = SpeculatorModel.from_pretrained(folder / "run" / "draft")
    first.save_pretrained(folder / "again")
    again = SpeculatorModel.from_pretrained(folder / "again").state_dict()
    for name, tensor in first.state_dict().items():
        if not torch.equal(tensor, again[name]):
            return f"{name} differs after it is written and read back"
    stored = first.config.speculators_config
    if stored is None:
        return "the configuration has no speculators_config, which names the verifier and the proposal methods"
    if stored.algorithm != trial.algorithm.name:
        return f"speculators_config.algorithm is {stored.algorithm!r}, but must be {trial.algorithm.name!r}"
    return None


def shapes(trial: Trial) -> str | None:
    """Return a fault if logits are no distribution, or not as wide as the draft's vocabulary."""
    ids = trial.draft.draft_ids
    width = VOCABULARY if ids is None else len(ids)
    for step, logits in enumerate(trial.logits(trial.tokens)):
        if logits.shape != (LENGTH, width):
            return f"logits of step {step} are {list(logits.shape)}, but must be [{LENGTH}, {width}]"
        if not bool((logits < torch.inf).all()) or not bool(logits.isfinite().any(-1).all()):
            return f"logits of step {step} are NaN, infinite, or minus infinity for all tokens"
    return None


@torch.no_grad()
def trained_logits(trial: Trial) -> str | None:
    """Return a fault if a network overrides ``logits``, and training computes others."""
    if installed().load(trial.algorithm, "module").measured is not DraftModule.measured:
        return None  # Such a draft chooses by other logits than those that are trained.
    for step, states in enumerate(trial.states(trial.tokens)):
        trained = SpeculatorModel.logits(trial.draft, states, step)
        if fault := difference(trial.draft.logits(states, step), trained):
            return f"step {step}: {fault}; training does not call `logits`, but `before_head`, `head_weights`, `finish`"
    return None


@torch.no_grad()
def drafting(trial: Trial) -> str | None:
    """Return a fault if the drafter of two sequences has other logits than ``unroll``, after one or several commits."""
    texts = [trial.tokens, trial.tokens + 7]
    features = [trial.features(text) for text in texts]
    drafter = trial.draft.drafter(len(texts))
    drafter.begin(torch.stack([text[0] for text in texts]))
    begins = (0, 0)
    for ends in ((6, 4), (7, 6), (11, 11)):
        spans = [slice(*pair) for pair in zip(begins, ends, strict=True)]
        new = Features(
            _padded([one.aux[0, span] for one, span in zip(features, spans, strict=True)]),
            _padded([one.last[0, span] for one, span in zip(features, spans, strict=True)]),
        )
        after = _padded([text[1:][span] for text, span in zip(texts, spans, strict=True)])
        drafter.commit(after, new, torch.tensor([span.stop - span.start for span in spans]))
        for where, found, expected in _grown(trial, drafter, texts, ends):
            if fault := difference(found, expected):
                return f"{where}: {fault}"
        begins = ends
    return None


def _grown(
    trial: Trial, drafter: Drafter, texts: Sequence[Tensor], ends: Sequence[int]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Grow a tree below each sequence; yield where each node is, its logits, and those of ``unroll``.

    It has two branches if the algorithm supports trees: the text's own tokens, and the ids after them. Their nodes swap
    columns at each level, so that neither a node's column nor the order of the calls tells its parent.
    """
    branches = [0, 1] if TREES & set(trial.algorithm.proposals) else [0]
    sequences = list(enumerate(zip(texts, ends, strict=True)))
    unrolled = [
        [trial.logits(torch.cat([text[: end + 1], text[end + 1 :] + branch])) for branch in branches]
        for _, (text, end) in sequences
    ]
    for number, (_, end) in sequences:
        yield _where(number, end, 0), drafter.root[number], unrolled[number][0][0][end - 1]
    parents = dict.fromkeys(branches, -1)
    for step in range(1, trial.steps):
        branches.reverse()
        tokens = torch.tensor([[int(text[end + step]) + branch for branch in branches] for _, (text, end) in sequences])
        of_nodes = torch.tensor([[parents[branch] for branch in branches]] * len(texts))
        logits = drafter.step(tokens, of_nodes)
        parents = {branch: (step - 1) * len(branches) + column for column, branch in enumerate(branches)}
        for number, (_, end) in sequences:
            for column, branch in enumerate(branches):
                where = _where(number, end, step) + ", on the second branch" * branch
                yield where, logits[number, column], unrolled[number][branch][step][end - 1]


def _where(sequence: int, end: int, step: int) -> str:
    return f"sequence {sequence} of the batch, after {end} tokens, draft step {step}"


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def causality(trial: Trial) -> str | None:
    """Return a fault if row t at step k depends on tokens after x_{t+1+k}, the last one that it may read."""
    before = trial.logits(trial.tokens)
    middle = LENGTH // 2
    after = trial.logits(torch.cat([trial.tokens[:middle], trial.tokens[middle:] + 1]))
    for step in range(trial.steps):
        # Row t reads the tokens up to x_{t+1+k}: all of them before the middle.
        rows = slice(0, middle - 1 - step)
        if fault := difference(after[step][rows], before[step][rows]):
            return f"step {step}, on a text that differs from token {middle}: {fault}"
    return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
