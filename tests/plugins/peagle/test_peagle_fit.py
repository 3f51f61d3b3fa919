"""P-EAGLE: training, decoding, start from EAGLE-3, resuming and export; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import RunsFolder, assert_same_weights, scalars, write_rows

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.commands.plugin_check import check_algorithm

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart"
UNUSED = 3  # it occurs in no text of the quickstart
DRAFT = {"num_layers": 1, "draft_vocab_size": 200, "mask_token_id": UNUSED}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RunsFolder:
    folder = tmp_path_factory.mktemp("peagle")

    def rows(split: str, number: int) -> str:
        lines = (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        return str(write_rows(folder / f"{split}.jsonl", [json.loads(line) for line in lines]))

    values = {
        "verifier": str(QUICKSTART / "verifier"),
        "trainer": {"accelerator": "cpu", "max_steps": 6, "max_epochs": 9, "log_every_n_steps": 1},
        "model": {"optimizer": {"lr": 4e-3}},
        "data": {
            "train": rows("train", 12),
            "validation": rows("validation", 3),
            "max_length": 128,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
    }
    return RunsFolder(folder, folder / "cache", values)


def fit(runs: RunsFolder, name: str, draft: dict[str, Any], *more: str) -> Path:
    words = runs.words(name, f"--model.draft={json.dumps(draft)}", *more)
    assert main(["fit", *words]) == 0
    return runs.run_folder(name)


@pytest.fixture(scope="module")
def run(runs: RunsFolder) -> Path:
    return fit(runs, "straight", DRAFT, "--algorithm=peagle", "--model.depths=4")


def test_it_trains_drafts_and_decodes() -> None:
    found = dict(check_algorithm("peagle", ["--model.draft.mask_token_id=5", "--model.depths=3"]))
    assert not [fault for fault in found.values() if fault is not None], found


def test_a_run_writes_a_draft_with_exact_figures(run: Path) -> None:
    losses = [value for _, value in scalars(run, "train/loss")]
    assert losses[-1] < losses[0]
    assert 1 <= scalars(run, "val/acceptance_length")[-1][1] <= 5
    draft = SpeculatorModel.from_pretrained(run / "draft")
    assert draft.config.num_depths == 4 and draft.config.mask_token_id == UNUSED


def test_a_resumed_run_trains_the_same_rows(runs: RunsFolder) -> None:
    words = ["--algorithm=peagle", "--model.depths=4", "--model.schedule.name=constant", "--model.schedule.warmup=0"]
    straight = fit(runs, "whole", DRAFT, *words)
    fit(runs, "stopped", DRAFT, *words, "--trainer.max_steps=2")
    resumed = fit(runs, "stopped", DRAFT, *words, "--ckpt_path=last")
    assert scalars(resumed, "train/loss")[-4:] == scalars(straight, "train/loss")[-4:]
    first, second = (SpeculatorModel.from_pretrained(folder / "draft").state_dict() for folder in (straight, resumed))
    assert_same_weights(first, second)


def test_it_starts_from_an_eagle3_draft(runs: RunsFolder) -> None:
    eagle = fit(runs, "eagle3", {"num_layers": 1, "draft_vocab_size": 200}, "--algorithm=eagle3", "--model.ttt_steps=2")
    words = ("--algorithm=peagle", f"--model.init_from={eagle / 'draft'}", "--trainer.max_steps=1")
    started = fit(runs, "started", DRAFT, *words, "--model.optimizer.lr=1e-9", "--model.depths=4")
    before, after = (SpeculatorModel.from_pretrained(folder / "draft").state_dict() for folder in (eagle, started))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    assert after.keys() - before.keys() <= {"mask_hidden", "embed_tokens.weight"}


def test_an_export_is_written_verified_and_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(run), "--format", "speculators", "--output", str(tmp_path / "export")]) == 0
    assert '"parallel_drafting": true' in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "export")]) == 0
    config = tmp_path / "export" / "config.json"
    written = config.read_text()
    for key, value, message in (
        ("mask_token_id", None, "mask_token_id"),
        ("fc_norm", True, "fc_norm"),
        ("norm_before_residual", None, "norm_before_residual"),
    ):
        config.write_text(json.dumps({**json.loads(written), key: value}))
        assert main(["verify", str(tmp_path / "export")]) != 0
        assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ({**DRAFT, "mask_token_id": 10**6}, "model.draft.mask_token_id is 1000000, but the verifier has ids 0 to"),
        ({**DRAFT, "mask_token_id": 7}, "which the texts hold"),
        ({**DRAFT, "mask_token_id": 0}, "the verifier's padding token"),
        ({"num_layers": 1, "draft_vocab_size": 200}, "has no free token"),
    ],
)
def test_impossible_mask_tokens_are_refused(
    runs: RunsFolder, draft: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *runs.words("refused", "--algorithm=peagle", f"--model.draft={json.dumps(draft)}")]) == 2
    assert message in capsys.readouterr().err
