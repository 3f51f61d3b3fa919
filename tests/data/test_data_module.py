from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from specforge.data.module import DraftDataModule
from specforge.errors import UsageError

Write = Callable[..., str]


def conversation(number: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"ask {number}"},
        {"role": "assistant", "content": "answer " * (number % 5 + 1)},
    ]
    return {"messages": turns}


@pytest.fixture
def train(write_lines: Write) -> str:
    return write_lines([conversation(number) for number in range(40)])


def ready(verifier: Path, train: str, **options: Any) -> DraftDataModule:
    module = DraftDataModule(str(verifier), train, **({"max_length": 128} | options))
    module.prepare_data()
    module.setup()
    return module


def documents(batches: Any) -> list[tuple[int, ...]]:
    """Return the token ids of each document in the batches that has supervised tokens."""
    found = []
    for batch in batches:
        for ids, mask, numbers in zip(batch["input_ids"], batch["loss_mask"], batch["document_ids"], strict=True):
            chosen = [numbers == number for number in range(int(numbers.max()) + 1)]
            found += [tuple(ids[own].tolist()) for own in chosen if mask[own].any()]
    return found


def test_batches_hold_every_document_once(verifier: Path, train: str) -> None:
    module = ready(verifier, train, batch_size=2, validation_share=0.25)
    assert len(module.train_rows) == 30
    assert module.validation_rows is not None
    assert len(module.validation_rows) == 10
    assert module.test_rows is None
    trained, held_out = documents(module.train_dataloader()), documents(module.val_dataloader())
    assert len(trained) == 30
    assert len(set(trained) | set(held_out)) == 40
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape[0] == 2
    assert batch["input_ids"].shape[1] <= 128


def test_prompts_are_supervised_in_training_only(verifier: Path, train: str) -> None:
    plain, whole = (ready(verifier, train, validation_share=0.25, supervise_prompts=one) for one in (False, True))
    for one, other in zip(plain.train_dataloader(), whole.train_dataloader(), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(
            one["document_ids"], other["document_ids"]
        )
        # Nothing precedes a document's first token.
        follows = other["document_ids"][:, 1:] == other["document_ids"][:, :-1]
        assert torch.equal(other["loss_mask"][:, 1:], follows & (other["document_ids"][:, 1:] >= 0))
        assert not other["loss_mask"][:, 0].any() and one["loss_mask"].sum() < other["loss_mask"].sum()
    for one, other in zip(plain.val_dataloader(), whole.val_dataloader(), strict=True):
        assert torch.equal(one["loss_mask"], other["loss_mask"])
    rows = whole.train_rows
    assert whole.vocabulary_counts().sum() == rows.lengths.sum() - len(rows) == rows.summary.supervised_tokens
    assert (rows.last_supervised == rows.lengths - 1).all() and rows.longest_response == rows.lengths.max() - 1
    assert torch.equal(rows.select(np.array([3]))[0]["loss_mask"], rows[3]["loss_mask"])


def test_the_held_out_rows_depend_on_the_seed(verifier: Path, train: str) -> None:
    held_out = [documents(ready(verifier, train, seed=seed).val_dataloader()) for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_a_validation_source_keeps_all_training_rows(verifier: Path, train: str, write_lines: Write) -> None:
    validation = write_lines([conversation(99)], "validation.jsonl")
    module = ready(verifier, train, validation=validation, test=validation)
    assert len(module.train_rows) == 40
    assert module.validation_rows is not None
    assert module.test_rows is not None
    assert len(module.validation_rows) == len(module.test_rows) == 1
    assert documents(module.test_dataloader()) == documents(module.val_dataloader())


def test_without_validation_and_test(verifier: Path, train: str) -> None:
    module = ready(verifier, train, validation_share=0)
    assert module.validation_rows is None
    assert module.val_dataloader() == []
    assert len(module.train_rows) == 40
    with pytest.raises(UsageError, match=r"data\.test is not set"):
        module.test_dataloader()


def test_one_row_cannot_be_split(verifier: Path, write_lines: Write) -> None:
    with pytest.raises(UsageError, match=r"data\.validation_share: one row, or the rows of one chat, cannot be split"):
        ready(verifier, write_lines([conversation(1)]))


def test_without_packing_each_row_holds_one_document(verifier: Path, train: str) -> None:
    module = ready(verifier, train, packing=False, batch_size=4)
    batches = list(module.train_dataloader())
    assert all(batch["document_ids"].max() == 0 for batch in batches)
    assert len(documents(batches)) == len(module.train_rows) == 38


def test_ranks_share_the_batches(verifier: Path, train: str) -> None:
    module = ready(verifier, train, packing=False)
    seen: list[tuple[int, ...]] = []
    for rank in range(3):
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 3})  # type: ignore
        seen += documents(module.val_dataloader())
    assert module.validation_rows is not None
    assert len(seen) == len(module.validation_rows) == 2


def test_vocabulary_counts_are_over_the_training_rows(verifier: Path, train: str) -> None:
    module = ready(verifier, train)
    expected = torch.zeros(module.vocabulary_size, dtype=torch.int64)
    for row in (module.train_rows[index] for index in range(len(module.train_rows))):
        expected += torch.bincount(row["input_ids"][row["loss_mask"]], minlength=module.vocabulary_size)
    assert torch.equal(module.vocabulary_counts(), expected)
    assert expected.sum() > 0


def test_the_summary_counts_kept_truncated_and_dropped_rows(verifier: Path, write_lines: Write) -> None:
    rows = [{"input_ids": [1] * length, "loss_mask": [0] * (length - 1) + [1]} for length in (4, 4, 9)]
    source = write_lines([*rows, {"input_ids": [1] * 12, "loss_mask": [0] * 4 + [1] * 8}])
    text = ready(verifier, source, max_length=8, validation_share=0).summary_text()
    assert "train: 3 rows, 16 tokens, 37.5% supervised; 2 packed rows, 100.0% full" in text
    assert f"of {source}: 1 truncated to 8 tokens; dropped: 1 no supervised token within max_length" in text


def test_token_rows_need_no_tokenizer(make_verifier: Callable[..., Path], write_lines: Write) -> None:
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}, {"input_ids": [4, 5], "loss_mask": [0, 1]}]
    module = ready(make_verifier(tokenizer=False), write_lines(rows), validation_share=0)
    assert sorted(documents(module.train_dataloader())) == [(1, 2, 3), (4, 5)]


def test_a_verifier_that_cannot_be_loaded_gives_a_one_line_error(
    make_verifier: Callable[..., Path], tmp_path: Path, train: str
) -> None:
    for verifier, part in ((make_verifier(tokenizer=False), "tokenizer"), (tmp_path, "config.json")):
        with pytest.raises(UsageError, match=f"^verifier: the {part} of {verifier} cannot be loaded: ") as refused:
            ready(verifier, train)
        assert "\n" not in str(refused.value)


def test_sources_are_checked_before_anything_is_loaded(train: str) -> None:
    for key in ("train", "validation", "test"):
        with pytest.raises(UsageError, match=rf"^data\.{key}: nowhere\.jsonl does not exist"):
            DraftDataModule("no-verifier", **({"train": train} | {key: "nowhere.jsonl"}))


@pytest.mark.parametrize("features", ["live", "record"])
def test_servers_that_are_not_asked_are_named(train: str, caplog: pytest.LogCaptureFixture, features: str) -> None:
    DraftDataModule("no-verifier", train, features=features, feature_servers=["http://localhost:8000/v1"])
    assert f"data.feature_servers are not asked, since data.features is {features}, not server" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    ["--data.batch_size=0", "--data.max_length=1", "--data.validation_share=1", "--data.num_workers=-1"],
)
def test_values_out_of_range_are_refused_while_parsing(
    train: str, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(DraftDataModule, "data")
    required = ["--data.verifier=v", f"--data.train={train}"]
    assert parser.parse_args([*required, "--data.validation_share=0"]).data.batch_size == 1
    with pytest.raises(SystemExit):
        parser.parse_args([*required, wrong])
    key, value = wrong.removeprefix("--").split("=")
    error = capsys.readouterr().err
    assert f'"{key}"' in error
    assert "conform to restriction" in error and value in error


class Recorder(pl.LightningModule):
    """Records the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: DraftDataModule, folder: Path, checkpoint: Path | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        **options,
    )
    trainer.fit(recorder, module, ckpt_path=checkpoint, weights_only=True)
    return recorder


def test_lightning_resumes_in_the_middle_of_an_epoch(verifier: Path, train: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation_share": 0, "batch_size": 2, "max_length": 64}
    expected = fit(DraftDataModule(str(verifier), train, **options), tmp_path / "whole").seen
    steps = len(expected) // 2
    assert steps > 3
    for done in (2, steps, steps + 1):
        checkpoint = tmp_path / "whole" / f"step={done}.ckpt"
        resumed = fit(DraftDataModule(str(verifier), train, **options), tmp_path / "resumed", checkpoint)
        assert resumed.seen == expected[done:]


def test_overfitting_a_few_batches_repeats_them(verifier: Path, train: str, tmp_path: Path) -> None:
    seen = fit(DraftDataModule(str(verifier), train, max_length=64), tmp_path, overfit_batches=2).seen
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
