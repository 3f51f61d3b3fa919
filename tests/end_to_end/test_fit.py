"""A run from the configuration to the draft on disk, and its measurement."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from quickstart_runs import DIVERGING, TTT_STEPS, VERIFIER, rows
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import assert_same_weights, scalars, weights, write_rows
from transformers import AutoConfig

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.verifier.fingerprint import fingerprint

STEPS = range(TTT_STEPS)


@pytest.fixture(scope="module")
def run(shared) -> Path:
    """The folder of a finished run of 12 steps."""
    assert main(["fit", *shared.words("runs")]) == 0
    return shared.run_folder("runs")


@pytest.fixture(scope="module")
def draft(run) -> SpeculatorModel:
    """The draft that the run wrote, loaded."""
    return SpeculatorModel.from_pretrained(run / "draft", verifier=str(VERIFIER), verifier_attachment_mode="train_only")


class TestFiles:
    def test_of_a_run(self, run):
        found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        expected = {
            "config.yaml",
            "checkpoints/last.ckpt",
            "checkpoints/best.ckpt",
            "checkpoints/previous.ckpt",
            "draft/config.json",
            "draft/model.safetensors",
        }
        assert expected <= found
        others = found - expected - {"hparams.yaml"}
        assert len(others) == 1 and others.pop().startswith("events.out.tfevents")
        assert [path.name for path in run.parent.iterdir()] == ["version_0"]

    def test_checkpoints_only_hold_the_draft(self, run):
        for name in ("last", "best"):
            saved = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
            assert saved["state_dict"]
            assert all(key.startswith("draft.") for key in saved["state_dict"])
            embeddings = [key for key in saved["state_dict"] if "embed" in key]
            assert not embeddings
        assert saved["global_step"] == 8  # the only validation is at the end of the first epoch
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12

    def test_the_stored_draft_is_that_of_the_best_checkpoint(self, run):
        best = {
            name.removeprefix("draft."): tensor for name, tensor in weights(run / "checkpoints" / "best.ckpt").items()
        }
        assert_same_weights(load_file(run / "draft" / "model.safetensors"), best)
        last = weights(run / "checkpoints" / "last.ckpt")
        assert not torch.equal(last["draft.fc.weight"], best["fc.weight"])

    def test_the_draft_loads_and_runs(self, run, draft):
        best = weights(run / "checkpoints" / "best.ckpt")
        assert_same_weights({f"draft.{name}": tensor for name, tensor in draft.state_dict().items()}, best)
        assert draft.verifier is None
        tokens = torch.tensor([[1, 5, 9, 12]])
        width = AutoConfig.from_pretrained(VERIFIER).hidden_size
        states = draft(
            tokens, torch.zeros(1, 4, 3, width), torch.arange(4)[None], torch.zeros_like(tokens), steps=TTT_STEPS
        )
        assert states.shape == (TTT_STEPS, 1, 4, width) and states.isfinite().all()

    def test_config_json_follows_the_layout(self, run):
        stored = json.loads((run / "draft" / "config.json").read_text())
        assert "model_type" not in stored
        assert stored["speculators_model_type"] == "eagle3"
        assert stored["architectures"] == ["Eagle3DraftModel"]
        assert stored["draft_vocab_size"] == 256
        assert stored["norm_before_residual"] is False
        assert stored["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
        layers, verifier = stored["transformer_layer_config"], AutoConfig.from_pretrained(VERIFIER)
        assert (layers["model_type"], layers["num_hidden_layers"]) == ("llama", 1)
        assert (layers["vocab_size"], layers["hidden_size"]) == (verifier.vocab_size, verifier.hidden_size)
        assert stored["speculators_config"] == {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": TTT_STEPS,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": str(VERIFIER),
                "architectures": ["LlamaForCausalLM"],
                "fingerprint": fingerprint(str(VERIFIER)),
            },
        }

    def test_maps_of_the_draft_vocabulary_agree(self, run):
        stored = load_file(run / "draft" / "model.safetensors")
        t2d, d2t = stored["t2d"], stored["d2t"]
        assert (t2d.dtype, d2t.dtype) == (torch.bool, torch.int64)
        assert torch.equal(d2t + torch.arange(256), t2d.nonzero().flatten())

    def test_config_yaml_is_the_complete_configuration(self, run, shared):
        stored = yaml.safe_load((run / "config.yaml").read_text())
        assert stored["ckpt_path"] is None
        assert stored["model"]["draft"]["draft_vocab_size"] == 256
        assert stored["model"]["schedule"]["name"] == "cosine"
        assert stored["data"]["train"] == shared.values["data"]["train"]


class TestEvents:
    @pytest.fixture(scope="class")
    def events(self, run) -> EventAccumulator:
        return EventAccumulator(str(run)).Reload()

    def test_tags(self, events):
        by_step = [f"{name}/step_{step}" for name in ("kl", "acceptance", "agreement") for step in STEPS]
        expected = {f"{stage}/{name}" for stage in ("train", "val") for name in ["loss", *by_step]}
        expected |= {f"train/{name}" for name in ("learning_rate", "tokens_per_second", "idle_share", "peak_memory_gb")}
        expected |= {f"{when}/{name}" for when in ("best", "final") for name in ("acceptance_length", "loss")}
        expected |= {"epoch", "val/acceptance_length"}
        expected |= {f"val/accept_rate_{kind}_{position + 1}" for kind in ("pos", "cond") for position in STEPS}
        expected |= {f"val/acceptance_length_at_{chain}" for chain in range(1, TTT_STEPS)}
        assert set(events.Tags()["scalars"]) == expected

    def test_one_value_per_step(self, events):
        for tag in ("train/loss", "train/kl/step_0", "train/learning_rate"):
            assert [scalar.step for scalar in events.Scalars(tag)] == list(range(12))
        assert [scalar.step for scalar in events.Scalars("val/loss")] == [7]

    def test_loss_falls(self, events):
        losses = [scalar.value for scalar in events.Scalars("train/loss")]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])

    def test_values_are_in_range(self, events):
        for stage in ("train", "val"):
            for step in STEPS:
                for name in ("acceptance", "agreement"):
                    assert all(0 <= scalar.value <= 1 for scalar in events.Scalars(f"{stage}/{name}/step_{step}"))
                assert all(scalar.value > 0 for scalar in events.Scalars(f"{stage}/kl/step_{step}"))
        assert all(scalar.value > 0 for scalar in events.Scalars("train/tokens_per_second"))

    def test_loss_is_the_decayed_sum_of_the_steps(self, events):
        for stage in ("train", "val"):
            total = [scalar.value for scalar in events.Scalars(f"{stage}/loss")]
            parts = [[scalar.value for scalar in events.Scalars(f"{stage}/kl/step_{step}")] for step in STEPS]
            summed = [sum(0.8**step * part[at] for step, part in enumerate(parts)) for at in range(len(total))]
            assert total == pytest.approx(summed, rel=1e-4)

    def test_learning_rate_warms_up_and_falls_to_nearly_zero(self, events):
        rates = [scalar.value for scalar in events.Scalars("train/learning_rate")]
        assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
        assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.1 * 4e-3

    def test_configuration_is_shown(self, events, run):
        tag = next(tag for tag in events.Tags()["tensors"] if "configuration" in tag)
        text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        assert "draft_vocab_size: 256" in text and "algorithm: eagle3" in text


def test_closing_lines_name_the_drafts_folder_and_the_next_commands(workshop, fit, capfd):
    run = fit("runs")
    shown = capfd.readouterr().out
    closing = shown[shown.index("Done:") :]
    assert str(run / "draft") in closing and "best draft" in closing
    assert "Traceback" not in shown
    typed = next(line for line in closing.splitlines() if "specforge validate" in line)
    words = shlex.split(typed[typed.index("specforge validate") :])
    assert main(words[1:]) == 0
    assert "val/acceptance/step_0" in capfd.readouterr().out


@pytest.mark.parametrize("checkpoint", ["best", "last"])
@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_measuring(shared, run, capfd, command, stage, checkpoint):
    data = ["--data.test", shared.values["data"]["validation"]]
    assert main([command, *shared.words("runs", "--ckpt_path", checkpoint, *data)]) == 0
    shown = capfd.readouterr().out
    for name in ["loss", *(f"{metric}/step_{step}" for metric in ("acceptance", "agreement", "kl") for step in STEPS)]:
        assert f"{stage}/{name}" in shown
    if checkpoint == "best":
        logged = scalars(run, "val/loss")[-1][1]
        line = next(line for line in shown.splitlines() if f"{stage}/loss" in line)
        assert float(line.replace("│", " ").split()[1]) == pytest.approx(logged, rel=1e-4)
    assert sorted(path.name for path in run.parent.iterdir()) == ["version_0"]


def test_measuring_does_not_change_the_run(shared, run, capfd):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["validate", *shared.words("runs")]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_test_without_test_rows_is_one_message(shared, run, capfd):
    assert main(["test", *shared.words("runs")]) == 2
    assert "data.test" in capfd.readouterr().err


def test_the_stored_configuration_gives_the_same_run(shared, run):
    again = shared.folder / "again"
    assert main(["fit", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    for tag in ("train/loss", "val/loss", "train/acceptance/step_2"):
        assert scalars(again / "version_0", tag) == scalars(run, tag)
    for name in ("last", "best"):
        assert_same_weights(
            weights(run / "checkpoints" / f"{name}.ckpt"), weights(again / "version_0" / "checkpoints" / f"{name}.ckpt")
        )


def test_another_seed_gives_another_run(workshop, fit, run):
    other = fit("other", "--seed_everything", "1", "--trainer.max_steps", "2")
    assert scalars(other, "train/loss")[0] != scalars(run, "train/loss")[0]


def test_runs_are_numbered(workshop, fit):
    fit("runs", "--trainer.max_steps", "1")
    assert main(["fit", *workshop.words("runs", "--trainer.max_steps", "1")]) == 0
    assert sorted(path.name for path in (workshop.folder / "runs").iterdir()) == ["version_0", "version_1"]


OBJECTIVES = ("kl", "reverse_kl", "cross_entropy", "total_variation", "jsd", "lk_alpha", "lk_lambda")


@pytest.mark.parametrize(
    "words",
    [
        *([f'--model.objective={{"{name}": 1.0}}'] for name in OBJECTIVES),
        ['--model.objective={"kl": 0.5, "lk_alpha": 0.5}'],
        ["--model.optimizer.name=muon"],
        ["--trainer.precision=bf16-mixed"],
        ["--model.supervision=compat"],
        ["--model.denominator=all"],
        ["--model.draft.train_embeddings=true"],
        ["--model.draft.train_head=false"],
        ["--model.draft.layer_type=qwen3"],
        ["--model.draft.num_layers=2"],
        ["--model.draft.draft_vocab_size=null"],
        ["--model.draft.draft_vocab_size=1280"],
        ["--model.draft.aux_layers=[1,8]"],
        ["--model.draft.norm_before_fc=true"],
        ["--model.draft.fc_norm=true", "--model.draft.norm_output=true"],
        ["--model.draft.norm_before_residual=true"],
        ["--model.ttt_steps=1"],
        ["--model.schedule.name=wsd"],
        ["--data.packing=false"],
        ["--data.long_rows=drop", "--data.max_length=64"],
        ["--data.validation=null", "--data.validation_share=0.2"],
        ["--trainer.accumulate_grad_batches=2"],
        ["--trainer.gradient_clip_val=0.5"],
        ["--trainer.enable_progress_bar=false"],
    ],
    ids=lambda words: " ".join(word.removeprefix("--") for word in words),
)
def test_each_setting_trains(workshop, fit, words):
    run = fit(
        "runs", "--trainer.max_steps=3", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", *words
    )
    losses = [value for _, value in scalars(run, "train/loss")]
    assert len(losses) == 3 and all(value == value and abs(value) < 1e4 for value in losses)
    draft = SpeculatorModel.from_pretrained(run / "draft", verifier=str(VERIFIER))
    changed = weights(run / "checkpoints" / "last.ckpt")
    assert changed.keys() == {f"draft.{name}" for name in draft.state_dict()}
    assert ("draft.embed_tokens.weight" in changed) == ("train_embeddings" in words[0])
    assert ("draft.d2t" in changed) == (not any("draft_vocab_size" in word for word in words))
    assert all(tensor.dtype in (torch.float32, torch.int64, torch.bool) for tensor in changed.values())


def test_steps_after_the_last_validation_are_mentioned_also_after_resuming(fit, capsys):
    words = ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    run = fit("runs", *words, "--trainer.max_steps=4")
    assert "not validated" not in capsys.readouterr().out
    fit("runs", *words, "--trainer.max_steps=5", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
    assert "The last 1 of 5 steps were not validated" in capsys.readouterr().out


def test_a_head_that_is_not_trained_stays_the_verifiers(workshop, fit):
    run = fit("runs", "--trainer.max_steps=2", "--model.draft.train_head=false")
    saved = weights(run / "checkpoints" / "last.ckpt")
    head = load_file(VERIFIER / "model.safetensors")
    matrix = head.get("lm_head.weight", head["model.embed_tokens.weight"]).float()
    assert torch.equal(saved["draft.lm_head.weight"], matrix[saved["draft.t2d"]])


def test_conversations_go_through_the_chat_template(workshop, fit):
    chats = [{"messages": row["messages"]} for row in rows("train.jsonl", 12)]
    source = write_rows(workshop.folder / "chats.jsonl", chats)
    run = fit("runs", "--data.train", str(source), "--trainer.max_steps=2")
    tokens = write_rows(
        workshop.folder / "tokens.jsonl",
        [{"input_ids": row["input_ids"], "loss_mask": row["loss_mask"]} for row in rows("train.jsonl", 12)],
    )
    same = fit("tokens", "--data.train", str(tokens), "--trainer.max_steps=2")
    # The stored tokens are those of the template, so both sources give the same run; sums may round differently.
    for (step, loss), (other_step, other) in zip(scalars(run, "train/loss"), scalars(same, "train/loss"), strict=True):
        assert step == other_step and loss == pytest.approx(other, rel=1e-6)


class TestWithoutValidation:
    def test_responses_too_short_to_draft_are_refused(self, workshop, capfd):
        source = workshop.folder / "single.jsonl"
        write_rows(source, [{"input_ids": [1, 5, 6, 7, 2], "loss_mask": [0, 0, 0, 0, 1]}] * 3)
        words = ["--data.validation", str(source), "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
        assert main(["fit", *workshop.words("runs", *words)]) == 2
        shown = capfd.readouterr().err
        assert "every response is a single token" in shown and "Traceback" not in shown

    def test_closing_lines_name_what_exists(self, workshop, fit, capfd):
        run = fit("runs", "--data.validation=null", "--data.validation_share=0", "--trainer.max_steps=2")
        closing = capfd.readouterr().out.partition("Done:")[2]
        assert "last draft" in closing
        assert not (run / "checkpoints" / "best.ckpt").exists()
        assert "--ckpt_path best" not in closing
        assert_same_weights(
            {f"draft.{name}": tensor for name, tensor in load_file(run / "draft" / "model.safetensors").items()},
            weights(run / "checkpoints" / "last.ckpt"),
        )


def test_a_users_checkpoint_callback_does_not_replace_ours(workshop, fit, capfd):
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "mine"}}]
    workshop.values["trainer"]["callbacks"] = callbacks
    run = fit("runs")
    best = weights(run / "checkpoints" / "best.ckpt")
    stored = load_file(run / "draft" / "model.safetensors")
    assert_same_weights({f"draft.{name}": tensor for name, tensor in stored.items()}, best)
    tau = scalars(run, "val/acceptance_length")[-1][1]
    assert f"val/acceptance_length {tau:.3f}" in capfd.readouterr().out.partition("Done:")[2]


def test_a_run_without_a_logger_can_be_measured(workshop, capfd):
    assert main(["fit", *workshop.words("runs", "--trainer.logger=false", "--trainer.max_steps=9")]) == 0
    assert main(["validate", *workshop.words("runs")]) == 0


def test_fast_dev_run_works_or_is_refused(workshop, capfd):
    status = main(["fit", *workshop.words("runs", "--trainer.fast_dev_run=true")])
    assert status == 0 or (status == 2 and "fast_dev_run" in capfd.readouterr().err)


class Updates(Callback):
    """Records the steps that update the weights."""

    steps: ClassVar[list[int]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(trainer.global_step)


def test_a_non_finite_loss_ends_the_run_before_it_reaches_the_weights(workshop, capfd):
    workshop.values["trainer"]["callbacks"] = [{"class_path": "test_fit.Updates"}]
    Updates.steps.clear()
    status = main(["fit", *workshop.words("runs", *DIVERGING)])
    assert status == 1
    message = capfd.readouterr().err
    assert "loss is" in message and "model.optimizer.lr" in message and "Traceback" not in message
    step = int(message.partition(" at step ")[2].partition(",")[0])
    assert Updates.steps == list(range(step))


def test_the_process_is_not_changed(workshop, fit):
    import signal

    handler, folder = signal.getsignal(signal.SIGINT), os.getcwd()
    fit("runs", "--trainer.max_steps=1")
    assert signal.getsignal(signal.SIGINT) is handler
    assert os.getcwd() == folder


class TestInitFrom:
    def test_starts_with_the_weights_of_a_stored_draft(self, run, workshop, fit):
        # Such a low learning rate leaves the weights unchanged.
        words = ["--model.init_from", str(run / "draft"), "--model.optimizer.lr=1e-12", "--trainer.max_steps=8"]
        again = fit("runs", *words)
        first, second = (load_file(folder / "draft" / "model.safetensors") for folder in (run, again))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-7) for name in first)

    def test_refuses_another_network_by_name(self, run, workshop, capfd):
        words = ["--model.init_from", str(run / "draft"), "--model.draft.num_layers=2"]
        assert main(["fit", *workshop.words("runs", *words)]) == 2
        message = capfd.readouterr().err
        assert "model.init_from" in message and "num_hidden_layers is 1 there and 2 here" in message
        assert "Traceback" not in message

    def test_refuses_a_missing_file(self, workshop, capfd):
        assert main(["fit", *workshop.words("runs", "--model.init_from=nowhere/at/all")]) == 2
        assert "nowhere/at/all" in capfd.readouterr().err
