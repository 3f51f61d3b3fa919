"""Checkpoints and drafts belong to one network and one verifier; differences are refused or reported by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quickstart_runs import VERIFIER, Workshop
from safetensors.torch import load_file, save_file

from specforge.__main__ import main
from specforge.verifier.fingerprint import fingerprint

ALGORITHMS = {
    "eagle3": ["--algorithm=eagle3"],
    "eagle": ["--algorithm=eagle", "--model.measured_steps=2", "--model.draft={}", "--model.schedule.warmup=0"],
}
# Settings that change the network or the verifier, and the expected parts of the message.
OTHERS = {
    "aux layers": ("eagle3", ["--model.draft.aux_layers=[1,3,6]"], "aux_layers is [2, 4, 5] there and [1, 3, 6] here"),
    "norm": ("eagle3", ["--model.draft.norm_output=true"], "norm_output is False there and True here"),
    "layers": ("eagle3", ["--model.draft.num_layers=2"], "num_hidden_layers is 1 there and 2 here"),
    "vocabulary": ("eagle3", ["--model.draft.draft_vocab_size=200"], "draft_vocab_size is 256 there and 200 here"),
    "verifier": ("eagle3", ["--verifier=TUNED"], "here: different weights"),
    "computation": ("eagle3", ["--verifier=OTHER_ROPE"], "here: a different computation in config.json"),
    "eagle's norms": ("eagle", ["--model.draft.layernorms=true"], "layernorms is False there and True here"),
    "eagle's verifier": ("eagle", ["--verifier=TUNED"], "here: different weights"),
}


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Copies of the quickstart's verifier: trained a little further, and with another rotary base."""
    root = tmp_path_factory.mktemp("other")
    for name in ("TUNED", "OTHER_ROPE"):
        shutil.copytree(VERIFIER, root / name)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(VERIFIER / "model.safetensors")
    for weight in weights.values():
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    save_file(weights, root / "TUNED" / "model.safetensors", {"format": "pt"})
    config = json.loads((VERIFIER / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (root / "OTHER_ROPE" / "config.json").write_text(json.dumps(config))
    return {name: str(root / name) for name in ("TUNED", "OTHER_ROPE")}


@pytest.fixture(scope="module")
def words(shared: Workshop) -> Callable[..., list[str]]:
    """Return the words of a short run of an algorithm."""
    shared.values["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "enable_progress_bar": False, "logger": False}
    del shared.values["model"]["ttt_steps"], shared.values["model"]["draft"]

    def make(algorithm: str, output_dir: str, *more: str) -> list[str]:
        chosen = ALGORITHMS[algorithm]
        if algorithm == "eagle3":
            chosen = [*chosen, "--model.ttt_steps=2", "--model.draft.draft_vocab_size=256"]
        return shared.words(output_dir, *chosen, *more)

    return make


@pytest.fixture(scope="module")
def runs(shared: Workshop, words: Callable[..., list[str]]) -> dict[str, Path]:
    """A run of each algorithm."""
    for algorithm in ALGORITHMS:
        assert main(["fit", *words(algorithm, algorithm)]) == 0
    return {algorithm: shared.run_folder(algorithm) for algorithm in ALGORITHMS}


def chosen(more: list[str], verifiers: dict[str, str]) -> list[str]:
    return [
        option.replace("TUNED", verifiers["TUNED"]).replace("OTHER_ROPE", verifiers["OTHER_ROPE"]) for option in more
    ]


@pytest.mark.parametrize("case", OTHERS)
def test_another_network_or_verifier_is_not_resumed(runs, words, verifiers, capfd, case):
    algorithm, more, message = OTHERS[case]
    last = runs[algorithm] / "checkpoints" / "last.ckpt"
    more = [*chosen(more, verifiers), f"--ckpt_path={last}", "--trainer.max_steps=6"]
    assert main(["fit", *words(algorithm, "refused", *more)]) == 2
    shown = capfd.readouterr().err
    assert f"{last} does not match this run: " in shown and message in shown and "Traceback" not in shown


@pytest.mark.parametrize("case", OTHERS)
def test_a_draft_of_another_network_or_verifier_is_not_started_from(runs, words, verifiers, capfd, case):
    algorithm, more, message = OTHERS[case]
    more = [*chosen(more, verifiers), f"--model.init_from={runs[algorithm] / 'draft'}"]
    assert main(["fit", *words(algorithm, "refused", *more)]) == 2
    shown = capfd.readouterr().err
    assert "model.init_from: " in shown and message in shown
    assert ("remove speculators_config.verifier.fingerprint" in shown) == ("verifier is" in shown)


def test_another_verifier_is_not_measured_or_exported_for(runs, words, verifiers, capfd, tmp_path):
    last = runs["eagle3"] / "checkpoints" / "last.ckpt"
    other = f"--verifier={verifiers['TUNED']}"
    assert main(["validate", *words("eagle3", "refused", other, f"--ckpt_path={last}")]) == 2
    assert "here: different weights" in capfd.readouterr().err
    command = ["export", str(runs["eagle3"]), "--format", "speculators", "--output", str(tmp_path / "out"), other]
    assert main([*command, "--skip_verifier"]) == 2
    shown = capfd.readouterr().err
    assert "was trained for the verifier" in shown and "different weights" in shown and not (tmp_path / "out").exists()


def test_a_draft_can_be_adapted_to_another_verifier_on_purpose(runs, words, verifiers, tmp_path):
    shutil.copytree(runs["eagle"] / "draft", tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["speculators_config"]["verifier"].pop("fingerprint") == fingerprint(str(VERIFIER))
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
    more = [f"--verifier={verifiers['TUNED']}", f"--model.init_from={tmp_path / 'draft'}", "--trainer.max_steps=1"]
    assert main(["fit", *words("eagle", "adapted", *more)]) == 0


def test_changed_settings_are_reported_and_take_effect(runs, words, shared, capfd):
    last = runs["eagle3"] / "checkpoints" / "last.ckpt"
    more = [
        f"--ckpt_path={last}",
        "--trainer.max_steps=8",
        "--model.optimizer.lr=1e-3",
        "--model.schedule.name=constant",
    ]
    assert main(["fit", *words("eagle3", "changed", *more, "--model.objective={cross_entropy: 1.0}")]) == 0
    shown = capfd.readouterr().out
    line = next(each for each in shown.splitlines() if each.startswith("resumed with other settings: "))
    for change in ("trainer.max_steps 4 -> 8", "model.optimizer.lr 0.004 -> 0.001", "model.objective.kl 1.0 -> None"):
        assert change in line
    assert "the learning rate continues at 0.001 instead of 0, following the current schedule at step 4" in shown
    group = torch.load(shared.run_folder("changed") / "checkpoints" / "last.ckpt", weights_only=True)
    assert group["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-3)


def test_equal_settings_are_not_reported(runs, words, capfd, shared):
    shutil.copytree(runs["eagle3"].parent, shared.folder / "same")
    assert main(["fit", *words("eagle3", "same", "--ckpt_path=last", "--trainer.max_steps=6")]) == 0
    shown = capfd.readouterr().out
    assert "resumed with other settings: trainer.max_steps 4 -> 6\n" in shown and "start from step 0" not in shown


def test_another_chat_template_is_reported(runs, words, capfd, tmp_path):
    shutil.copytree(VERIFIER, tmp_path / "verifier")
    template = tmp_path / "verifier" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another one #}")
    more = [f"--verifier={tmp_path / 'verifier'}", f"--ckpt_path={runs['eagle'] / 'checkpoints' / 'last.ckpt'}"]
    assert main(["fit", *words("eagle", "template", *more, "--trainer.max_steps=5")]) == 0
    shown = capfd.readouterr().out
    line = next(each for each in shown.splitlines() if each.startswith("resumed with other settings: "))
    assert "settings: tokenizer " in line and ", verifier " in line


def test_other_trained_weights_are_refused(runs, words, capfd):
    more = [f"--ckpt_path={runs['eagle3'] / 'checkpoints' / 'last.ckpt'}", "--model.draft.train_head=false"]
    assert main(["fit", *words("eagle3", "refused", *more, "--trainer.max_steps=6")]) == 2
    assert "trainable parameters differ: lm_head.weight" in capfd.readouterr().err


def test_starting_from_a_draft_reports_a_new_schedule(runs, words, capfd):
    more = [f"--model.init_from={runs['eagle'] / 'draft'}", "--trainer.max_steps=1"]
    assert main(["fit", *words("eagle", "started", *more)]) == 0
    assert "optimizer and schedule start from step 0" in capfd.readouterr().out


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_warning(runs, words, tmp_path):
    checkpoint = torch.load(runs["eagle"] / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["identity"], checkpoint["settings"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    more = [f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_steps=5"]
    with pytest.warns(UserWarning, match="of an earlier version, does not name its draft and verifier"):
        assert main(["fit", *words("eagle", "earlier", *more)]) == 0
