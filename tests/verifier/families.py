"""Try every family of ``tiny_families`` as a verifier and write the results into docs/families.md.

    python tests/verifier/families.py            try all of them and write the table
    python tests/verifier/families.py gpt2 opt   try some and print the results

Each is a tiny random verifier, used with specforge's commands as a user would, all in this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import torch
import transformers
from tiny_families import FAMILIES, VOCABULARY, make
from torch import Tensor
from transformers import PreTrainedModel

from specforge.__main__ import main
from specforge.checkpoints.verification import served
from specforge.data.features.store import FeatureStore
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError
from specforge.models import SpeculatorModel
from specforge.verifier.features import capture, packs
from specforge.verifier.loading import load_verifier

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ALGORITHMS = {
    "eagle3": ["--algorithm", "eagle3", "--model.draft.draft_vocab_size", "64", "--model.ttt_steps", "3"],
    "eagle": ["--algorithm", "eagle"],
    "hass": ["--algorithm", "eagle", "--model.alignment_steps", "3", "--model.draft.fusion_bias", "true"],
    "mlp": ["--algorithm", "mlp"],
}
YES = "yes"
NEW_TOKENS = 12


@dataclass
class Outcome:
    """Results for a family.

    Attributes:
        model_class: Class of the verifier.
        packed: Whether the documents of a packed row run in one forward pass.
        found: ``YES`` or the reason of the failure, by trial.
    """

    model_class: str = ""
    packed: bool = False
    found: dict[str, str] = field(default_factory=dict)


class Trial:
    """Trial of one family in its own folder.

    Args:
        name: Its name in ``FAMILIES``.
        folder: An empty folder.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.verifier_folder = folder / "verifier"
        make(name, self.verifier_folder)
        self.rows = write_rows(folder / "rows.jsonl")

    def verifier(self) -> PreTrainedModel:
        """Load the verifier."""
        return load_verifier(str(self.verifier_folder))

    def fit(self, algorithm: str, output: str, *more: str) -> str:
        """Train for two steps on packed rows."""
        return command(
            "fit",
            *self._words(algorithm),
            *("--output_dir", str(self.folder / output), "--seed_everything", "1"),
            *("--trainer.max_steps", "2", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
            *("--trainer.logger", "false"),
            *more,
        )

    def stored(self) -> str:
        """Store the states, check each row's against a separate run of the row, and train on them."""
        features = self.folder / "features"
        outcome = command(
            "prepare", "features", *self._words("eagle3"), "--output", str(features), "--dtype", "float32"
        )
        if outcome != YES:
            return outcome
        store, verifier = FeatureStore(features), self.verifier()
        for line in self.rows.read_text(encoding="utf-8").splitlines():
            tokens = np.array(json.loads(line)["input_ids"])
            index = int(store.locate(np.frombuffer(row_digest(tokens), np.uint64).reshape(1, 2))[0])
            row = torch.tensor(tokens)[None]
            *aux, last = store.manifest.layers
            separate = capture(verifier, row, torch.arange(row.shape[1])[None], aux)
            for layer, state in zip((*aux, last), (*separate.aux[0].unbind(1), separate.last[0]), strict=True):
                values, _ = store.read(index, layer)
                if not _close(values, state[: len(values)]):
                    return f"the stored states of layer {layer} differ from those of the separate document"
        return self.fit("eagle3", "stored", "--data.features", str(features))

    def export(self, run: str = "eagle3") -> str:
        """Export the draft of a run and verify the export with the verifier."""
        output = self.folder / "export"
        with patch.object(served, "NEW_TOKENS", NEW_TOKENS):
            outcome = command("export", str(self._draft(run)), "--format", "vllm", "--output", str(output))
        if outcome != YES:
            return outcome
        return command("verify", str(output), "--verifier", str(self.verifier_folder))

    def generate(self, run: str = "eagle3") -> str:
        """Check that generation with the draft of a run gives the verifier's own text."""
        draft, verifier = SpeculatorModel.from_pretrained(self._draft(run)), self.verifier()
        prompts = torch.tensor([[5, 9, 14, 33, 60], [7, 3, 71, 20, 11]])
        with torch.no_grad():
            expected = verifier.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        draft.attach_verifier(verifier)
        try:
            found = draft.generate(prompts, max_new_tokens=NEW_TOKENS, eos_token_id=[])
        except SpecforgeError as error:
            return str(error)
        return YES if torch.equal(found, expected) else "the text differs from the verifier's"

    def _draft(self, run: str) -> Path:
        return self.folder / run / "version_0" / "draft"

    def _words(self, algorithm: str) -> list[str]:
        return [
            *ALGORITHMS[algorithm],
            *("--verifier", str(self.verifier_folder)),
            *("--data.train", str(self.rows), "--data.validation", str(self.rows)),
            *("--data.max_length", "64", "--data.batch_size", "1", "--data.cache_dir", str(self.folder / "cache")),
            *("--trainer.accelerator", "cpu"),
        ]


def packed_states_are_right(verifier: PreTrainedModel) -> bool:
    """Return whether documents of a packed row have the same states as separate rows."""
    tokens = torch.arange(3, 3 + 40).remainder(VOCABULARY)[None]
    lengths = [19, 1, 20]
    packed = capture(verifier, tokens, torch.cat([torch.arange(length) for length in lengths])[None], [0, 2, 4])
    separate = [
        capture(verifier, document, torch.arange(document.shape[1])[None], [0, 2, 4])
        for document in tokens.split(lengths, dim=1)
    ]
    return _close(packed.last, torch.cat([features.last for features in separate], 1)) and _close(
        packed.aux, torch.cat([features.aux for features in separate], 1)
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def write_rows(path: Path) -> Path:
    """Write token rows."""
    rng = random.Random(0)
    rows = []
    for _ in range(6):
        length = rng.randint(8, 30)
        rows.append({
            "input_ids": [rng.randrange(3, VOCABULARY) for _ in range(length)],
            "loss_mask": [int(index > 3) for index in range(length)],
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(*words: str) -> str:
    """Run a command; return ``YES`` or its error message."""
    outcome = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(outcome):
        status = main(list(words))
    if status == 0:
        return YES
    return re.sub(r"\S+/(verifier|draft)\b", r"\1", outcome.getvalue().rpartition("error: ")[2].strip())


def try_family(name: str, folder: Path) -> Outcome:
    """Run all trials of a family."""
    trial = Trial(name, folder)
    verifier = trial.verifier()
    found = {algorithm: trial.fit(algorithm, algorithm) for algorithm in ALGORITHMS}
    if not packed_states_are_right(verifier):
        found["eagle3"] = "packed documents have other states than separate ones"
    if found["eagle3"] == YES:
        found |= {"stored": trial.stored(), "export": trial.export(), "generate": trial.generate()}
    return Outcome(type(verifier).__name__, packs(verifier), found)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return a Markdown table with the reasons below it."""
    trials = (*ALGORITHMS, "stored", "export", "generate")
    reasons: list[str] = []

    def cell(outcome: str) -> str:
        if outcome == YES:
            return YES
        if outcome not in reasons:
            reasons.append(outcome)
        return f"no ({reasons.index(outcome) + 1})"

    lines = [
        f"| family | class of the verifier | packed rows | {' | '.join(trials)} |",
        "|---" * (len(trials) + 3) + "|",
    ]
    for name, outcome in outcomes.items():
        cells = [cell(outcome.found.get(trial, "there is no draft")) for trial in trials]
        packed = "one pass" if outcome.packed else "one document per row"
        lines.append(f"| {name} | `{outcome.model_class}` | {packed} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))])


def run(names: list[str]) -> int:
    """Try the given families, or all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    outcomes = {}
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = try_family(name, Path(folder))
        print(name, outcomes[name], flush=True)
    if names:
        print(table(outcomes))
        return 0
    before, mark, _ = PAGE.read_text(encoding="utf-8").partition("<!-- table -->")
    PAGE.write_text(f"{before}{mark}\n\n{table(outcomes)}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
