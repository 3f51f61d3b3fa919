"""Complete runs on the quickstart's verifier: training, stopping, resuming, measuring and decoding."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import RunsFolder, assert_same_values, scalars, write_rows

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.training.module import DraftModule

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
PADDING = 0  # it occurs in no text of the quickstart
STEPS = 6  # an epoch
DRAFT = {"num_layers": 1, "mask_token_id": PADDING}
NETWORKS: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 4, "draft_vocab_size": 400},
    "dflash2": {"block_size": 4, "selector_rank": 8, "selector_top_k": 6},
    "dspark": {"block_size": 3, "markov_rank": 16},
}


def quickstart_rows(name: str, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()[:number]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RunsFolder:
    folder = tmp_path_factory.mktemp("blocks")
    sources = {
        split: str(write_rows(folder / f"{split}.jsonl", quickstart_rows(f"{split}.jsonl", number)))
        for split, number in (("train", 12), ("validation", 3))
    }
    values = {
        "verifier": str(VERIFIER),
        "trainer": {"accelerator": "cpu", "max_steps": STEPS, "max_epochs": 9, "log_every_n_steps": 1},
        "model": {"anchors": 8, "optimizer": {"lr": 4e-3}},
        "data": {**sources, "max_length": 128, "batch_size": 2, "cache_dir": str(folder / "cache")},
    }
    return RunsFolder(folder, folder / "cache", values)


@pytest.fixture(scope="module")
def fit(runs: RunsFolder) -> Callable[..., Path]:
    """Train a draft once per name; return the run's folder."""

    def run(algorithm: str, name: str | None = None, *more: str) -> Path:
        output = name or algorithm
        if more or not runs.run_folder(output).exists():
            settings = json.dumps({**DRAFT, **NETWORKS[algorithm]})
            words = runs.words(output, "--algorithm", algorithm, f"--model.draft={settings}", *more)
            assert main(["fit", *words]) == 0
        return runs.run_folder(output)

    return run


@pytest.mark.parametrize("algorithm", NETWORKS)
def test_a_run_writes_a_draft_and_its_figures(algorithm: str, fit: Callable[..., Path]) -> None:
    run = fit(algorithm)
    losses = [value for _, value in scalars(run, "train/loss")]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    tau = scalars(run, "val/acceptance_length")[-1][1]
    assert 1 <= tau <= 4
    stored = json.loads((run / "draft" / "config.json").read_text())
    assert stored["speculators_model_type"] == stored["speculators_config"]["algorithm"] == algorithm
    assert stored["sample_from_anchor"] is (algorithm == "dspark") and stored["sliding_window_non_causal"] is True
    assert stored["mask_token_id"] == PADDING and stored["aux_hidden_state_layer_ids"]
    assert not any("embed" in name for name in load_file(run / "draft" / "model.safetensors"))


@pytest.mark.parametrize("algorithm", NETWORKS)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    algorithm: str, fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws the same anchors."""
    straight = fit(algorithm)
    right, seen = DraftModule.training_step, []

    def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
        seen.append(batch_idx)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return right(self, batch, batch_idx)

    monkeypatch.setattr(DraftModule, "training_step", step)
    with pytest.raises(SystemExit):
        fit(algorithm, f"{algorithm} again")
    resumed = fit(algorithm, f"{algorithm} again", "--ckpt_path=last")
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (resumed, straight))
    assert first["global_step"] == second["global_step"] == STEPS
    assert_same_values(first["state_dict"], second["state_dict"])
    assert_same_values(first["optimizer_states"], second["optimizer_states"])


@pytest.mark.parametrize("algorithm", NETWORKS)
def test_replay_measures_what_decoding_does(
    algorithm: str, fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluate reports if rounds of real decoding differ from the replay of their text."""
    draft = str(fit(algorithm) / "draft")
    prompts = str(write_rows(tmp_path / "prompts.jsonl", quickstart_rows("validation.jsonl", 2)))
    words = ["--prompts", prompts, "--max_new_tokens", "20", "--output", str(tmp_path / "out")]
    assert main(["evaluate", draft, *words, "--proposal", "greedy", "dynamic_tree:depth=3", "--baselines"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "other tokens than replay" not in capsys.readouterr().err
    for contender in results["contenders"]:
        assert contender["all_sets"]["identical_responses"] == contender["all_sets"]["responses"]


@pytest.mark.parametrize("algorithm", NETWORKS)
def test_generated_text_is_the_verifiers(algorithm: str, fit: Callable[..., Path]) -> None:
    draft = SpeculatorModel.from_pretrained(fit(algorithm) / "draft", verifier=str(VERIFIER))
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = draft.verifier.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(draft.generate(prompt, max_new_tokens=12), expected)


def test_the_confidence_is_calibrated_on_the_validation_of_the_written_draft(
    fit: Callable[..., Path],
) -> None:
    run = fit("dspark")
    draft = SpeculatorModel.from_pretrained(run / "draft")
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    temperatures = draft.config.confidence_temperatures
    assert temperatures == best["draft_config"]["confidence_temperatures"] and len(temperatures) == 3
    error, raw = (scalars(run, f"val/{name}")[-1][1] for name in ("confidence_ece", "confidence_ece_raw"))
    assert 0 <= error <= raw < 1


def test_a_finished_draft_starts_another_run(fit: Callable[..., Path]) -> None:
    first = fit("dspark")
    again = fit("dspark", "from another", f"--model.init_from={first / 'draft'}", "--trainer.max_steps=1")
    assert scalars(again, "train/loss")[0][1] < scalars(first, "train/loss")[0][1]


def test_a_verifier_without_a_free_token_is_one_message(runs: RunsFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *runs.words("none", "--algorithm", "dflash")]) == 2
    error = capsys.readouterr().err
    assert "has no free token: its tokenizer uses all of its 1,280 ids; set model.draft.mask_token_id" in error
    assert "Traceback" not in error
