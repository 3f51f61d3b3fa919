"""Complete runs on rows and on the draft's own text, stopped and resumed; and uses of the draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import RunsFolder, assert_same_values, scalars, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.checkpoints.export import ExportRequest, export
from specforge.training.module import DraftModule

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
STEPS = 8
LAYERS = "--model.draft.init_layers=[0,7]"
ON_POLICY = ["--model.on_policy.share=0.5", "--model.on_policy.new_tokens=6"]
VARIANTS: dict[str, list[str]] = {
    "layers": [LAYERS],
    "fresh": ["--model.draft.num_layers=1", "--model.draft.hidden_size=48"],
    "on policy": [LAYERS, *ON_POLICY],
    # An epoch has 3 steps, the last one of a single batch; all states are stored.
    "accumulated": [LAYERS, *ON_POLICY, "--trainer.accumulate_grad_batches=2", "--data.features=record"],
}


class Crash(Exception):
    """An exception that the program does not handle."""


def rows(name: str, number: int) -> list[dict[str, Any]]:
    lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:number]]


def runs_in(folder: Path, cache: Path) -> RunsFolder:
    runs = RunsFolder(folder, cache)
    # 10 packed rows of training: 5 batches of 2 an epoch.
    runs.values = {
        "algorithm": "draft_model",
        "verifier": str(VERIFIER),
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": 9,
            "log_every_n_steps": 1,
            "limit_val_batches": 1,
            "gradient_clip_val": 1.0,
        },
        "model": {"optimizer": {"lr": 2e-3}, "schedule": {"name": "constant", "warmup": 0}},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", rows("train.jsonl", 11))),
            "validation": str(write_rows(folder / "validation.jsonl", rows("validation.jsonl", 4))),
            "max_length": 128,
            "batch_size": 2,
            "cache_dir": str(cache),
        },
    }
    return runs


@pytest.fixture(scope="session")
def row_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def runs(tmp_path: Path, row_cache: Path) -> RunsFolder:
    return runs_in(tmp_path, row_cache)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, row_cache: Path
) -> Iterator[Callable[[str], tuple[Path, list[dict[str, Any]]]]]:
    """Run a variant without a stop, once; its folder, and the batches that it was trained on."""
    shared, original = runs_in(tmp_path_factory.mktemp("shared"), row_cache), DraftModule.training_step
    seen: dict[str, list[dict[str, Any]]] = {}

    def run(variant: str) -> tuple[Path, list[dict[str, Any]]]:
        if variant not in seen:
            seen[variant] = []

            def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
                seen[variant].append(
                    {name: tensor.clone() for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
                )
                return original(self, batch, batch_idx)

            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(DraftModule, "training_step", step)
                assert main(["fit", *shared.words(variant, *VARIANTS[variant])]) == 0
        return shared.run_folder(variant), seen[variant]

    yield run


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Crash at the n-th batch from now on; never with -1."""
    original = DraftModule.training_step

    def arm(number: int) -> None:
        seen = 0

        def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
            nonlocal seen
            seen += 1
            if seen == number:
                raise Crash
            return original(self, batch, batch_idx)

        monkeypatch.setattr(DraftModule, "training_step", step)

    return arm


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    values: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return values


@pytest.mark.parametrize("variant", ["layers", "fresh"])
def test_training_lowers_the_loss(variant: str, trained: Callable[..., Any]) -> None:
    run, batches = trained(variant)
    losses = [loss for _, loss in scalars(run, "train/loss")]
    assert len(batches) == STEPS and min(losses[-2:]) < 0.95 * losses[0]
    assert scalars(run, "val/acceptance_length")
    # One step is trained, several are measured.
    assert scalars(run, "val/acceptance/step_4")


def test_a_run_on_its_own_text_changes_responses_in_every_second_batch(trained: Callable[..., Any]) -> None:
    plain, own = trained("layers")[1], trained("on policy")[1]
    for number, (batch, other) in enumerate(zip(own, plain, strict=True)):
        changed = batch["input_ids"] != other["input_ids"]
        assert bool(changed.any()) == bool(number % 2)
        assert not bool((changed & ~batch["loss_mask"]).any())
        assert all(torch.equal(batch[name], other[name]) for name in batch if name != "input_ids")


def test_stored_states_are_not_used_for_text_of_the_draft(trained: Callable[..., Any]) -> None:
    batches = trained("accumulated")[1]
    stored = ["last" in batch for batch in batches]
    # None are stored in the first epoch, and never those of a text that the draft changed.
    assert len(batches) > 10 and not any(stored[:5]) and not any(stored[1::2]) and any(stored[::2])


CRASHES = [("on policy", 4, 3), ("accumulated", 6, 3)]


@pytest.mark.parametrize(("variant", "batch", "saved"), CRASHES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    variant: str,
    batch: int,
    saved: int,
    runs: RunsFolder,
    trained: Callable[..., Any],
    crash_at: Callable[[int], None],
) -> None:
    straight, own = trained(variant)[0], [*VARIANTS[variant], "--save_every_n_steps=1"]
    crash_at(batch)
    with pytest.raises(Crash):
        main(["fit", *runs.words(variant, *own)])
    run = runs.run_folder(variant)
    assert checkpoint(run)["global_step"] == saved
    crash_at(-1)
    assert main(["fit", *runs.words(variant, *own, "--ckpt_path", "last")]) == 0
    for name in ("last", "best"):
        ours, theirs = checkpoint(run, name), checkpoint(straight, name)
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert_same_values(ours[part], theirs[part])
    assert_same_values(*(load_file(folder / "draft" / "model.safetensors") for folder in (run, straight)))


def test_the_draft_can_be_started_from(runs: RunsFolder, trained: Callable[..., Any]) -> None:
    draft = trained("layers")[0] / "draft"
    more = [LAYERS, "--model.init_from", str(draft), "--trainer.max_steps=1", "--model.optimizer.lr=1e-9"]
    assert main(["fit", *runs.words("runs", *more)]) == 0
    stored, start = load_file(draft / "model.safetensors"), checkpoint(runs.run_folder("runs"))["state_dict"]
    for name, tensor in stored.items():
        torch.testing.assert_close(start[f"draft.{name}"], tensor, atol=1e-6, rtol=0)


def test_an_export_is_a_model_of_transformers(trained: Callable[..., Any], tmp_path: Path) -> None:
    """With equal logits; transformers loads it, also as an assistant model, and ``verify`` accepts it."""
    run = trained("layers")[0]
    done = export(ExportRequest(str(run), "transformers", tmp_path / "export"))
    assert done.agreement.rounds > 10 and not done.agreement.differing
    assert '--speculative-config \'{"method": "draft_model"' in done.serving
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    prompt = tokenizer("How many days are 3 weeks?", return_tensors="pt")
    tokens = prompt["input_ids"]
    draft = SpeculatorModel.from_pretrained(run / "draft")
    positions = torch.arange(tokens.shape[1])[None]
    expected = draft.logits(draft.advance(tokens, positions))
    torch.testing.assert_close(plain(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    verifier = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    texts = [
        verifier.generate(**prompt, max_new_tokens=16, do_sample=False, **more)
        for more in ({}, {"assistant_model": plain.eval()})
    ]
    assert torch.equal(*texts)
    assert main(["verify", str(tmp_path / "export"), "--verifier", str(VERIFIER)]) == 0
    # Read again as a draft, it equals the trained one.
    words = [str(tmp_path / "export"), "--verifier", str(VERIFIER), "--output", str(tmp_path / "again")]
    assert main(["convert", *words]) == 0
    assert_same_values(*(load_file(folder / "model.safetensors") for folder in (run / "draft", tmp_path / "again")))


def test_a_changed_export_is_detected(
    trained: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(ExportRequest(str(trained("layers")[0]), "transformers", tmp_path / "export", runs_verifier=False))
    path = tmp_path / "export" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}))
    assert main(["verify", str(tmp_path / "export")]) == 1
    assert "language_model.rope_parameters.rope_theta" in capsys.readouterr().out


def test_generated_text_is_the_verifiers(trained: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "How many days are 3 weeks?", "--max_new_tokens", "16"]
    assert main(["generate", str(trained("layers")[0] / "draft"), *prompt, "--proposal", "dynamic_tree"]) == 0
    ours = capsys.readouterr().out.strip()
    assert main(["generate", "--verifier", str(VERIFIER), "--proposal", "prompt_lookup", *prompt]) == 0
    assert ours and ours == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.draft.init_layers=[0,8]"], "model.draft.init_layers: [0, 8] must be ascending ids"),
        (["--model.draft.init_model=nowhere/here/there"], "model.draft.init_model: nowhere/here/there is not a folder"),
        ([LAYERS, "--model.draft.init_model=x/y"], "init_model and init_layers exclude each other"),
        (["--model.on_policy.share=0"], "share"),
        (["--model.on_policy.new_tokens=0"], "new_tokens"),
    ],
)
def test_wrong_settings_are_one_line(
    more: list[str], message: str, runs: RunsFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *runs.words("runs", *more)]) == 2
    shown = capfd.readouterr().err
    errors = [line for line in shown.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in shown
