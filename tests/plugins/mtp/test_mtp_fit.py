"""Heads trained from where the verifier has them, resumed, loaded, started from others; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import RunsFolder, assert_same_weights, scalars, write_rows

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.commands.plugin_check import check_algorithm
from specforge.verifier.loading import VerifierLoading
from specforge_mtp.module import MtpModule
from specforge_mtp.native import read_head

CONFIGS = Path(__file__).parents[3] / "configs"
QUICKSTART = CONFIGS / "quickstart" / "verifier"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, verifier_of: Callable[[str], Path]) -> RunsFolder:
    folder = tmp_path_factory.mktemp("mtp")
    tokens = torch.arange(10 * 32).view(10, 32) * 31 % 90 + 3
    rows = [{"input_ids": one.tolist(), "loss_mask": [0] * 8 + [1] * 24} for one in tokens]
    values = {
        "algorithm": "mtp",
        "verifier": str(verifier_of("qwen3")),
        "trainer": {"accelerator": "cpu", "max_steps": 6, "max_epochs": 9, "log_every_n_steps": 1},
        "model": {"optimizer": {"lr": 3e-3}},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", rows)),
            "validation": str(write_rows(folder / "validation.jsonl", rows[:3])),
            "max_length": 64,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
    }
    return RunsFolder(folder, folder / "cache", values)


@pytest.fixture
def fit(runs: RunsFolder) -> Callable[..., Path]:
    def run(name: str, *more: str) -> Path:
        assert main(["fit", *runs.words(name, *more)]) == 0
        return runs.run_folder(name)

    return run


def draft_of(run: Path) -> Any:
    return SpeculatorModel.from_pretrained(run / "draft")


def test_a_new_head_trains_drafts_and_decodes() -> None:
    found = dict(check_algorithm("mtp", ["--model.draft.fresh=true"]))
    assert not [fault for fault in found.values() if fault is not None], found


def test_the_untouched_head_is_measured_first(
    fit: Callable[..., Path], verifier_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit("measured")
    lines = capsys.readouterr().out
    before = re.search(r"step +0  val/acceptance_length_proxy ([\d.]+)  before training", lines)
    assert before is not None
    assert re.search(rf"before training {before[1]}, trained [\d.]+: [+-]\d+\.\d%", lines)
    logged = scalars(run, "val/acceptance_length_proxy")
    assert logged[0][0] == 0 and f"{logged[0][1]:.3f}" == before[1]
    losses = [value for _, value in scalars(run, "train/loss")]
    assert losses[-1] < losses[0]
    # What was measured is the head as it is stored: a draft that has learnt nothing has the same figure.
    again = fit("unchanged", "--model.optimizer.lr=1e-12")
    stored = read_head(draft_of(again).config, str(verifier_of("qwen3")), VerifierLoading())
    for name, tensor in draft_of(again).state_dict().items():
        torch.testing.assert_close(tensor, stored[name], atol=1e-6, rtol=0)
    figures = [value for _, value in scalars(again, "val/acceptance_length_proxy")]
    assert figures == [logged[0][1]] * len(figures)


def test_a_resumed_run_ends_in_the_same_weights_and_remembers_the_first_figure(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    constant = ["--model.schedule.name=constant", "--model.schedule.warmup=0", "--trainer.val_check_interval=2"]
    straight = fit("straight", *constant)
    expected = re.findall("before training [^:]*", capsys.readouterr().out)
    fit("stopped", *constant, "--trainer.max_steps=2")
    resumed = fit("stopped", *constant, "--ckpt_path=last")
    assert scalars(resumed, "train/loss")[-4:] == scalars(straight, "train/loss")[-4:]
    assert_same_weights(draft_of(straight).state_dict(), draft_of(resumed).state_dict())
    assert re.findall("before training [^:]*", capsys.readouterr().out)[-1] == expected[-1]


def test_a_checkpoint_is_loaded_and_a_head_is_started_from(fit: Callable[..., Path]) -> None:
    run = fit("first", "--trainer.max_steps=2")
    module = MtpModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(one, stored[f"draft.{name}"]) for name, one in module.draft.state_dict().items())
    started = fit("started", f"--model.init_from={run / 'draft'}", "--model.optimizer.lr=1e-12")
    assert_same_weights(
        {name: one.half() for name, one in draft_of(started).state_dict().items()},
        {name: one.half() for name, one in draft_of(run).state_dict().items()},
    )


def test_several_heads_learn_from_recorded_states(fit: Callable[..., Path], verifier_of: Callable[[str], Path]) -> None:
    words = [f"--verifier={verifier_of('deepseek_v3')}", "--model.mtp_steps=2", "--data.features=record"]
    run = fit("several", *words, "--trainer.max_epochs=2", "--model.objective={text: 1.0}")
    losses = [value for _, value in scalars(run, "train/loss")]
    assert losses[-1] < losses[0] and draft_of(run).num_heads == 2


def test_the_recipes_train(runs: RunsFolder, verifier_of: Callable[[str], Path], tmp_path: Path) -> None:
    data = [f"--data.{name}={runs.values['data'][name]}" for name in ("train", "validation", "cache_dir")]
    words = [*data, "--data.max_length=64", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    words += ["--trainer.val_check_interval=1", f"--output_dir={tmp_path}"]
    recipe = ["fit", "--config", str(CONFIGS / "mtp.yaml"), f"--verifier={verifier_of('qwen3_5')}", *words]
    assert main([*recipe, "--trainer.accumulate_grad_batches=2"]) == 0
    new_head = ["fit", "--config", str(CONFIGS / "mtp-new-head.yaml"), f"--verifier={verifier_of('qwen3')}", *words]
    assert main(new_head) == 0


def edited(source: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a verifier, and change one of its JSON files."""
    shutil.copytree(source, folder)
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    return folder


def without_head(index: dict[str, Any]) -> None:
    index["weight_map"] = {name: one for name, one in index["weight_map"].items() if not name.startswith("mtp.")}


def without_a_norm(index: dict[str, Any]) -> None:
    del index["weight_map"]["mtp.norm.weight"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (INDEX, without_head, "holds no multi-token-prediction head: it has no tensor mtp.fc.weight"),
        (INDEX, without_a_norm, "only a part of its prediction head: it has no tensor mtp.norm.weight"),
        ("config.json", lambda one: one.update(mtp_num_hidden_layers=2), "only a part of its prediction head"),
    ],
)
def test_verifiers_without_the_whole_head(
    file: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
    runs: RunsFolder,
    verifier_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verifier = edited(verifier_of("qwen3"), tmp_path / "verifier", file, change)
    assert main(["fit", *runs.words("refused", f"--verifier={verifier}", "--model.mtp_steps=2")]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_shard_and_a_quantised_head(
    runs: RunsFolder, verifier_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verifier = shutil.copytree(verifier_of("qwen3"), tmp_path / "verifier")
    path = verifier / "model-of-the-head.safetensors"
    tensors = load_file(path)
    tensors["mtp.norm.weight"] = tensors["mtp.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    words = runs.words("refused", f"--verifier={verifier}")
    assert main(["fit", *words]) == 2
    assert "mtp.norm.weight is torch.float8_e4m3fn; quantised heads are not trained" in capsys.readouterr().err
    path.unlink()
    assert main(["fit", *words]) == 2
    assert "holds no model-of-the-head.safetensors" in capsys.readouterr().err


def test_families_without_a_known_head_and_more_steps_than_heads(
    runs: RunsFolder, verifier_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *runs.words("refused", f"--verifier={QUICKSTART}")]) == 2
    assert "head of 'llama' verifiers, if there is one, is not known" in capsys.readouterr().err
    assert main(["fit", *runs.words("refused", f"--verifier={verifier_of('deepseek_v3')}")]) == 2
    assert "model.mtp_steps is 3" in (error := capsys.readouterr().err) and "use at most 2" in error
