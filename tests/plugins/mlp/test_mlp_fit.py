"""Complete runs in one and in two stages, stopped and resumed, and uses of the draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlp_runs import HEADS, NEW, PROMPT, TWO_STAGES, VERIFIER, Workshop, checkpoint, quickstart_rows
from safetensors.torch import load_file
from torch import Tensor
from training_runs import assert_same_values, scalars
from transformers import AutoModelForCausalLM

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.models.chain.alignment import align
from specforge.training.module import DraftModule
from specforge_mlp.module import MLPModule
from specforge_mlp.schedule import two_stage_factor

Batches = list[dict[str, Tensor]]
STEPS, BEGIN, EPOCH = 8, 3, 5
VARIANTS: dict[str, list[str]] = {
    "one stage": [],
    "two stages": TWO_STAGES,
    "prepared": [*TWO_STAGES, "--data.stage_two=prepared.jsonl"],
    # An epoch has 3 steps, the last one of a single batch.
    "accumulated": [*TWO_STAGES, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=5"],
}


class Crash(Exception):
    """An exception that the program does not handle."""


@pytest.fixture(scope="session")
def row_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def make_workshop(folder: Path, cache: Path) -> Workshop:
    workshop = Workshop(folder, cache)
    workshop.write("prepared.jsonl", quickstart_rows("train.jsonl", 7, skip=100))
    return workshop


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, row_cache: Path) -> Workshop:
    """A folder of runs shared by all tests."""
    return make_workshop(tmp_path_factory.mktemp("shared"), row_cache)


@pytest.fixture
def workshop(tmp_path: Path, row_cache: Path) -> Workshop:
    return make_workshop(tmp_path, row_cache)


def words(workshop: Workshop, variant: str, *more: str) -> list[str]:
    own = [option.replace("=prepared", f"={workshop.folder}/prepared") for option in VARIANTS[variant]]
    return workshop.words(variant, *own, *more)


@pytest.fixture(scope="module")
def trained(shared: Workshop) -> Iterator[Callable[[str], tuple[Path, Batches]]]:
    """Run a variant without a stop, once; its folder, and the batches that it was trained on."""
    original = DraftModule.training_step
    seen: dict[str, Batches] = {}

    def run(variant: str) -> tuple[Path, Batches]:
        folder = shared.run_folder(variant)
        if variant not in seen:
            seen[variant] = []

            def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
                seen[variant].append({n: tensor.clone() for n, tensor in batch.items() if isinstance(tensor, Tensor)})
                return original(self, batch, batch_idx)

            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(DraftModule, "training_step", step)
                assert main(["fit", *words(shared, variant)]) == 0
        return folder, seen[variant]

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


def documents(batch: dict[str, Tensor]) -> list[list[int]]:
    """The documents of a batch, of all rows."""
    found = []
    for tokens, ids in zip(batch["input_ids"], batch["document_ids"], strict=True):
        found += [tokens[ids == number].tolist() for number in ids[ids >= 0].unique()]
    return found


def known(name: str, number: int, skip: int = 0) -> list[list[int]]:
    return [row["input_ids"][:128] for row in quickstart_rows(name, number, skip)]


def test_one_stage_trains_on_the_rows(trained: Callable[..., tuple[Path, Batches]]) -> None:
    run, batches = trained("one stage")
    rows = known("train.jsonl", 11)
    assert len(batches) == STEPS
    assert all(document in rows for batch in batches for document in documents(batch))
    rates = [rate for _, rate in scalars(run, "train/learning_rate")]
    assert rates == pytest.approx([1e-2 * two_stage_factor(step, None, STEPS) for step in range(STEPS)])
    losses = [loss for _, loss in scalars(run, "train/loss")]
    assert losses[-1] < 0.95 * losses[0] and scalars(run, "val/acceptance_length")


def test_stage_two_trains_on_the_verifiers_text(trained: Callable[..., tuple[Path, Batches]]) -> None:
    plain = trained("one stage")[1]
    run, batches = trained("two stages")
    assert len(batches) == STEPS
    verifier = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    for number, (batch, rows) in enumerate(zip(batches, plain, strict=True)):
        if number < BEGIN:
            assert_same_values(batch, rows)
            continue
        prompts = []
        for document in documents(rows):
            cut = [document[at : at + PROMPT] for at in range(0, len(document) - PROMPT + 1, PROMPT)]
            prompts += cut or [document]
        assert len(batch["input_ids"]) == len(prompts)
        for tokens, mask, ids, prompt in zip(
            batch["input_ids"], batch["loss_mask"], batch["document_ids"], prompts, strict=True
        ):
            length = int((ids >= 0).sum())
            assert tokens[: len(prompt)].tolist() == prompt and len(prompt) < length <= len(prompt) + NEW
            assert mask.tolist() == [len(prompt) <= position < length for position in range(len(tokens))]
            logits = verifier(tokens[None, :length]).logits[0]
            for position in range(len(prompt), length):
                assert int((logits[position - 1] > logits[position - 1, tokens[position]] + 1e-4).sum()) < 10
    rates = [rate for _, rate in scalars(run, "train/learning_rate")]
    assert rates == pytest.approx([1e-2 * two_stage_factor(step, BEGIN, STEPS) for step in range(STEPS)])


def test_the_rows_of_another_epoch_get_other_text(trained: Callable[..., tuple[Path, Batches]]) -> None:
    texts: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for batch in trained("two stages")[1][BEGIN:]:
        for tokens, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True):
            prompt = tuple(tokens[: int(mask.int().argmax())].tolist())
            texts.setdefault(prompt, []).append(tuple(tokens[mask].tolist()))
    repeated = [written for written in texts.values() if len(written) > 1]
    assert repeated and any(len(set(written)) > 1 for written in repeated)


def test_stage_two_may_be_prepared(trained: Callable[..., tuple[Path, Batches]]) -> None:
    plain, batches = trained("one stage")[1], trained("prepared")[1]
    for batch, rows in zip(batches[:BEGIN], plain, strict=False):
        assert_same_values(batch, rows)
    prepared = known("train.jsonl", 7, skip=100)
    read = [document for batch in batches[BEGIN:] for document in documents(batch)]
    assert all(document in prepared for document in read)
    # They are few and repeated.
    assert all(document in read for document in prepared) and len(read) > len(prepared)


def test_the_start_of_stage_two_counts_optimizer_steps(trained: Callable[..., tuple[Path, Batches]]) -> None:
    run, batches = trained("accumulated")
    # Steps have 2, 2 and 1 batches, then 2 and 2 of the next epoch; the fourth one is the first of stage 2.
    rows = known("train.jsonl", 11)
    assert [all(document in rows for document in documents(batch)) for batch in batches] == [True] * 5 + [False] * 4
    assert checkpoint(run)["global_step"] == 5


CRASHES = [
    ("two stages", 3, 2),
    ("two stages", 4, 3),
    ("two stages", 5, 4),
    ("two stages", 7, 6),
    ("prepared", 6, 5),
    ("accumulated", 4, 1),
    ("accumulated", 6, 3),
    ("accumulated", 9, 4),
]


@pytest.mark.parametrize(("variant", "batch", "saved"), CRASHES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    variant: str,
    batch: int,
    saved: int,
    workshop: Workshop,
    trained: Callable[..., tuple[Path, Batches]],
    crash_at: Callable[[int], None],
) -> None:
    straight = trained(variant)[0]
    crash_at(batch)
    with pytest.raises(Crash):
        main(["fit", *words(workshop, variant, "--save_every_n_steps=1")])
    run = workshop.run_folder(variant)
    assert checkpoint(run)["global_step"] == saved
    crash_at(-1)
    assert main(["fit", *words(workshop, variant, "--save_every_n_steps=1", "--ckpt_path", "last")]) == 0
    for name in ("last", "best"):
        ours, theirs = checkpoint(run, name), checkpoint(straight, name)
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert_same_values(ours[part], theirs[part])
    assert_same_values(*(load_file(folder / "draft" / "model.safetensors") for folder in (run, straight)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.stage_two.begin=8"], r"model.stage_two.begin: stage 2 would start at step 8, but the run has 8"),
        (["--model.stage_two.begin=0.01"], r"model.stage_two.begin: stage 2 would start at step 0, but the run has 8"),
        ([*TWO_STAGES, "--trainer.overfit_batches=1"], "trainer.overfit_batches"),
        (["--model.stage_two.prompt_length=400", "--model.stage_two.new_tokens=113"], "the 512 tokens of the verifier"),
        ([*TWO_STAGES, "--data.stage_two=nowhere.jsonl"], "data.stage_two"),
        (["--model.stage_two.begin=0"], "begin"),
        (["--model.stage_two.buffers=3"], "buffers"),
        (["--model.draft.num_layers=0"], "num_layers"),
    ],
    ids=["begin after the end", "begin at once", "overfit", "context", "missing file", "begin", "unknown", "no heads"],
)
def test_invalid_settings_are_reported_in_one_line(
    more: list[str], message: str, workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *workshop.words("runs", *more)]) == 2
    shown = capfd.readouterr().err
    errors = [line for line in shown.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in shown


def test_another_schedule_may_be_chosen(workshop: Workshop) -> None:
    more = ["--model.schedule.name=constant", "--model.schedule.warmup=0", "--trainer.max_steps=4"]
    assert main(["fit", *workshop.words("runs", *TWO_STAGES, *more)]) == 0
    rates = [rate for _, rate in scalars(workshop.run_folder("runs"), "train/learning_rate")]
    assert rates == pytest.approx([1e-2] * 4)


def test_the_summary_names_the_start_of_stage_two(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *workshop.words("runs", *TWO_STAGES, "--trainer.max_steps=4")]) == 0
    assert "stage 2, on the verifier's text, from step 3 of 4" in capfd.readouterr().out


def test_errors_of_generation_end_the_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise Crash

    monkeypatch.setattr("specforge_mlp.data.generate_batch", broken)
    with pytest.raises(Crash):
        main(["fit", *workshop.words("runs", *TWO_STAGES)])


def test_the_run_writes_a_draft_in_our_layout(trained: Callable[..., tuple[Path, Batches]]) -> None:
    run = trained("two stages")[0]
    stored = json.loads((run / "draft" / "config.json").read_text())
    assert stored["speculators_model_type"] == stored["speculators_config"]["algorithm"] == "mlp"
    assert (stored["num_layers"], stored["intermediate_size"], stored["hidden_size"]) == (HEADS, 48, 64)
    assert stored["speculators_config"]["verifier"]["name_or_path"] == str(VERIFIER)
    best = checkpoint(run, "best")["state_dict"]
    written = load_file(run / "draft" / "model.safetensors")
    assert_same_values({f"draft.{name}": tensor for name, tensor in written.items()}, dict(best))
    draft = SpeculatorModel.from_pretrained(run / "draft", verifier=str(VERIFIER))
    assert draft.config.num_layers == HEADS


def test_validate_reports_the_acceptance_length(
    shared: Workshop, trained: Callable[..., tuple[Path, Batches]], capfd: pytest.CaptureFixture[str]
) -> None:
    trained("two stages")
    assert main(["validate", *words(shared, "two stages")]) == 0
    assert "val/acceptance_length" in capfd.readouterr().out


@pytest.mark.parametrize("proposal", ["greedy", "candidate_tree"])
def test_generate_gives_the_verifiers_own_text(
    proposal: str, trained: Callable[..., tuple[Path, Batches]], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "How many days are 3 weeks?", "--max_new_tokens", "16"]
    assert main(["generate", str(trained("two stages")[0] / "draft"), *prompt, "--proposal", proposal]) == 0
    ours = capsys.readouterr().out.strip()
    assert main(["generate", "--verifier", str(VERIFIER), "--proposal", "prompt_lookup", *prompt]) == 0
    assert ours and ours == capsys.readouterr().out.strip()


def test_evaluate_measures_the_draft(
    shared: Workshop, trained: Callable[..., tuple[Path, Batches]], tmp_path: Path
) -> None:
    draft = trained("two stages")[0] / "draft"
    prompts = shared.folder / "validation.jsonl"
    choices = ["--proposal", "greedy", "candidate_tree", "--max_new_tokens", "12", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(draft), "--prompts", str(prompts), *choices]) == 0
    measured = json.loads((tmp_path / "out" / "results.json").read_text())
    methods = [contender["proposal"]["proposal_type"] for contender in measured["contenders"] if contender["draft"]]
    assert methods == ["greedy", "candidate_tree"]


def test_the_draft_can_be_started_from(workshop: Workshop, trained: Callable[..., tuple[Path, Batches]]) -> None:
    draft = trained("one stage")[0] / "draft"
    more = ["--model.init_from", str(draft), "--trainer.max_steps=1", "--model.optimizer.lr=1e-9"]
    assert main(["fit", *workshop.words("runs", *more)]) == 0
    stored, started = load_file(draft / "model.safetensors"), checkpoint(workshop.run_folder("runs"))["state_dict"]
    for name, tensor in stored.items():
        torch.testing.assert_close(started[f"draft.{name}"], tensor, atol=1e-6, rtol=0)


def test_stage_two_trains_only_on_generated_text(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published, independent of stage 1: a row counts where the verifier generated a token."""
    counted: list[tuple[int, int]] = []
    original = MLPModule.draft_steps

    def steps(self: MLPModule, batch: Any, features: Any) -> Any:
        outcome = original(self, batch, features)
        if self.training:
            written = align(batch["loss_mask"], batch["document_ids"], HEADS).supervised
            counted.append((int(outcome.supervised.sum()), int(written.sum())))
        return outcome

    monkeypatch.setattr(MLPModule, "draft_steps", steps)
    more = ["--model.supervision=all", "--trainer.max_steps=5"]
    assert main(["fit", *workshop.words("runs", *TWO_STAGES, *more)]) == 0
    assert all(trained > written for trained, written in counted[:BEGIN])
    assert all(trained == written for trained, written in counted[BEGIN:])


def test_lengths_do_not_matter_where_stage_two_is_prepared(workshop: Workshop) -> None:
    more = ["--model.stage_two.new_tokens=500", "--trainer.max_steps=4"]
    assert main(["fit", *words(workshop, "prepared", *more)]) == 0


def test_prepared_text_without_a_stage_two_is_refused(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    more = [f"--data.stage_two={workshop.folder}/prepared.jsonl", "--trainer.max_steps=1"]
    assert main(["fit", *workshop.words("runs", *more)]) == 2
    assert "model.stage_two" in capfd.readouterr().err
