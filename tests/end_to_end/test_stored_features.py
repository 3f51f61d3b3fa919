"""Training on stored states has the same losses as with a live verifier."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart_runs import VERIFIER, Workshop, rows
from safetensors.torch import save_file
from training_runs import scalars, write_rows

from specforge.__main__ import main
from specforge.data.features.growing import GrowingStore
from specforge.data.features.store import FeatureStore
from specforge.training import teacher
from specforge.verifier.loading import load_verifier

ALGORITHMS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle": {"algorithm": "eagle", "model": {"optimizer": {"lr": 1e-3}, "schedule": {"warmup": 1}}},
    "hass": {
        "algorithm": "eagle",
        "model": {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}, "schedule": {"warmup": 1}},
    },
    # The stores were prepared for the first of these; this one reads the same layers.
    "dspark": {
        "algorithm": "dspark",
        "model": {"draft": {"num_layers": 1, "aux_layers": [2, 4, 5], "mask_token_id": 0}},
    },
    "mlp": {"algorithm": "mlp", "model": {"draft": {"num_layers": 2, "intermediate_size": 48}}},
    "mlp, soft": {
        "algorithm": "mlp",
        "model": {"draft": {"num_layers": 2, "intermediate_size": 48}, "objective": {"kl": 1.0}},
    },
}
STEPS = "--trainer.max_steps=3"
VALIDATE = "--trainer.val_check_interval=3"


def prepare(workshop: Workshop, name: str, *more: str) -> Path:
    output = workshop.folder / name
    if not output.exists():
        words = ["prepare", "features", "--config", str(workshop.config), "--output", str(output), *more]
        assert main(words) == 0
    return output


@pytest.fixture
def no_verifier(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(teacher, "load_verifier", lambda *_: pytest.fail("the verifier was loaded"))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each verifier forward pass from now on."""
    passes: list[int] = []
    capture = teacher.capture

    def count(verifier: Any, input_ids: Any, *arguments: Any) -> Any:
        passes.append(input_ids.numel())
        return capture(verifier, input_ids, *arguments)

    monkeypatch.setattr(teacher, "capture", count)
    return passes


@pytest.fixture(scope="module")
def stores(shared: Workshop) -> dict[str, Path]:
    """States of one configuration: they hold what all algorithms read."""
    stored = {dtype: prepare(shared, dtype, "--dtype", dtype) for dtype in ("float32", "bfloat16")}
    return {**stored, "without the last tokens": without_ends(stored["bfloat16"])}


def without_ends(folder: Path) -> Path:
    """Copy a store without the state of each row's last token, as engines write it while they answer."""
    store = FeatureStore(folder)
    copy = GrowingStore(folder.with_name("without_ends"), replace(store.manifest, shards=()))
    for index, digest in enumerate(store._digests):
        states = torch.stack([store.read(index, layer)[0] for layer in store.manifest.layers])
        copy.add(digest.tobytes(), states[:, :-1])
    copy.flush()
    copy.publish()
    return copy.folder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_losses_equal_those_with_a_live_verifier(shared, workshop, fit, stores, no_verifier, algorithm):
    # The same files, so that the stored rows are found.
    workshop.values |= {**ALGORITHMS[algorithm], "data": shared.values["data"]}
    live = fit("live", STEPS, VALIDATE)
    no_verifier()
    for dtype, bound in (("float32", 1e-5), ("without the last tokens", 5e-3)):
        stored = fit(dtype, STEPS, VALIDATE, f"--data.features={stores[dtype]}", "--data.num_workers=2")
        for tag in ("train/loss", "val/loss"):
            expected = [value for _, value in scalars(live, tag)]
            assert len(expected) == {"train/loss": 3, "val/loss": 1}[tag]
            assert [value for _, value in scalars(stored, tag)] == pytest.approx(expected, rel=bound)


def test_compat_supervision_reads_one_state_more(shared, workshop, fit, stores):
    # The rows end in tokens that are not supervised.
    for name in ("train", "validation"):
        cut = [{**row, "loss_mask": row["loss_mask"][:-6] + [0] * 6} for row in rows(f"{name}.jsonl", 12)]
        workshop.values["data"][name] = str(write_rows(workshop.folder / f"{name}.jsonl", cut))
    store = prepare(workshop, "store", "--dtype", "float32")
    tokens = sum(shard.tokens for shard in FeatureStore(store).manifest.shards)
    assert tokens == sum(
        len(row["input_ids"]) - 5 for name in ("train", "validation") for row in rows(f"{name}.jsonl", 12)
    )
    for words in (["--model.supervision=compat"], []):
        live, stored = (
            fit(f"{kind}{len(words)}", STEPS, *words, f"--data.features={kind}") for kind in ("live", str(store))
        )
        expected = [value for _, value in scalars(live, "train/loss")]
        assert [value for _, value in scalars(stored, "train/loss")] == pytest.approx(expected, rel=1e-4)


def test_the_last_state_can_be_an_aux_layer_too(workshop, fit):
    words = ["--model.draft.aux_layers=[0,8]"]
    store = prepare(workshop, "store", *words, "--dtype", "float32")
    assert FeatureStore(store).manifest.layers == [0, 8]
    live, stored = (fit(kind[-5:], STEPS, *words, f"--data.features={kind}") for kind in ("live", str(store)))
    expected = [value for _, value in scalars(live, "train/loss")]
    assert [value for _, value in scalars(stored, "train/loss")] == pytest.approx(expected, rel=1e-5)


def test_complete_rows_are_stored_if_all_tokens_are_trained_on(shared, workshop, fit, stores, capfd):
    workshop.values |= {**ALGORITHMS["mlp"], "data": shared.values["data"]}
    words = ["--model.supervision=all", STEPS]
    assert main(["fit", *workshop.words("refused", *words, f"--data.features={stores['float32']}")]) == 2
    assert "trains on whole rows" in capfd.readouterr().err
    store = prepare(workshop, "whole", "--model.supervision=all", "--dtype", "float32")
    live, stored = fit("live", *words), fit("stored", *words, f"--data.features={store}")
    expected = [value for _, value in scalars(live, "train/loss")]
    assert [value for _, value in scalars(stored, "train/loss")] == pytest.approx(expected, rel=1e-4)


def test_text_that_the_verifier_writes_while_training_is_captured_live(shared, workshop, fit, stores, captured):
    workshop.values |= {**ALGORITHMS["mlp"], "data": shared.values["data"]}
    stage_two = ["--model.stage_two.begin=2", "--model.stage_two.prompt_length=16", "--model.stage_two.new_tokens=4"]
    stored = fit("stored", "--trainer.max_steps=4", *stage_two, f"--data.features={stores['float32']}")
    assert len(captured) == 2
    live = fit("live", "--trainer.max_steps=4", *stage_two)
    expected = [value for _, value in scalars(live, "train/loss")]
    assert [value for _, value in scalars(stored, "train/loss")] == pytest.approx(expected, rel=1e-4)


class TestRecording:
    def test_each_row_is_captured_once(self, workshop, fit, captured, tmp_path):
        words = [f"--data.cache_dir={tmp_path / 'cache'}"]
        live = fit("live", *words, "--trainer.max_steps=16")
        captured.clear()
        words.append("--data.num_workers=1")
        recorded = fit("recorded", *words, "--data.features=record", "--trainer.max_steps=16")
        first_epoch = len(captured)
        assert first_epoch == 8 + len(scalars(live, "val/loss")) // 2 * 2
        again = fit("again", *words, "--data.features=record", "--trainer.max_steps=16")
        assert len(captured) == first_epoch
        for run in (recorded, again):
            for tag in ("train/loss", "val/loss"):
                expected = [value for _, value in scalars(live, tag)]
                assert [value for _, value in scalars(run, tag)] == pytest.approx(expected, rel=2e-2)

    def test_states_captured_before_a_stop_are_not_captured_again(self, workshop, fit, captured, tmp_path):
        words = [f"--data.cache_dir={tmp_path / 'cache'}", "--data.features=record", "--trainer.limit_val_batches=0"]
        fit("runs", *words, "--trainer.max_steps=5")
        assert len(captured) == 5
        fit("runs", *words, "--trainer.max_steps=16", "--ckpt_path=last")
        assert len(captured) == 8


class TestRefusals:
    def test_a_store_without_the_last_tokens_is_not_for_compat(self, shared, stores, capfd):
        features = f"--data.features={stores['without the last tokens']}"
        assert main(["fit", *shared.words("refused", features, "--model.supervision=compat")]) == 2
        assert "lacks 40 of the 40 rows of data.train" in capfd.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model.draft.aux_layers=[1,2,3]"], "lacks layers [1, 3] (it has [2, 4, 5, 8])"),
            (
                ["--data.max_length=64"],
                "lacks 27 of the 30 rows of data.train; prepare features with the same sources and data.max_length",
            ),
            (["--data.features=nowhere"], "data.features: nowhere is not a feature store"),
        ],
    )
    def test_a_store_that_does_not_fit_is_refused(self, shared, stores, capfd, words, message):
        features = [] if "--data.features" in words[0] else [f"--data.features={stores['float32']}"]
        assert main(["fit", *shared.words("refused", *features, *words)]) == 2
        assert message in capfd.readouterr().err

    def test_another_verifier_is_named(self, shared, stores, tiny_verifiers, tmp_path, capfd):
        other = str(tiny_verifiers["llama"].folder)
        tokens = {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 1]}
        source = write_rows(tmp_path / "rows.jsonl", [tokens, {**tokens, "input_ids": [4, 6, 7, 8, 9]}])
        words = [f"--verifier={other}", f"--data.train={source}", f"--data.validation={source}"]
        words += ["--model.draft.draft_vocab_size=20", f"--data.features={stores['float32']}"]
        assert main(["fit", *shared.words("refused", *words)]) == 2
        message = capfd.readouterr().err
        assert "states of another verifier" in message and other in message

    def test_missing_validation_rows_are_captured(self, shared, fit, stores, workshop, captured, capfd):
        workshop.values["data"] = {**shared.values["data"], "validation": workshop.values["data"]["validation"]}
        changed = [{**row, "input_ids": [*row["input_ids"][:-1], 7]} for row in rows("validation.jsonl", 8)]
        write_rows(Path(workshop.values["data"]["validation"]), changed)
        fit("runs", STEPS, VALIDATE, f"--data.features={stores['float32']}")
        assert "8 of the 8 validation rows are missing: the verifier runs on them" in capfd.readouterr().out
        assert len(captured) == 2


class TestCommand:
    def test_prints_what_is_saved_and_the_next_command(self, workshop, capfd):
        words = ["prepare", "features", "--config", str(workshop.config), "--output", str(workshop.folder / "out")]
        assert main([*words, "--dtype", "int8"]) == 0
        shown = capfd.readouterr().out
        assert "48 rows, 4,272 tokens" in shown and "272 bytes per token (int8)" in shown
        assert "aux layers [2, 4, 5] and the last state (8) of 9 states: saves 55.6%" in shown
        assert "int8 instead of bfloat16: saves 46.9%" in shown
        assert shown.splitlines()[-1].endswith(f"--data.features {workshop.folder / 'out'}")
        assert main([*words, "--dtype", "int8", "--verify"]) == 0
        assert "all checksums" in capfd.readouterr().out

    def test_runs_under_a_launcher_of_processes(self, workshop, monkeypatch):
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "TORCHELASTIC_RUN_ID": 1}.items():
            monkeypatch.setenv(name, str(value))
        assert FeatureStore(prepare(workshop, "out")).manifest.dtype == "bfloat16"

    def test_sources_override_those_of_the_configuration(self, workshop):
        output = workshop.folder / "out"
        source = workshop.values["data"]["validation"]
        words = ["prepare", "features", source, "--algorithm", "eagle3", "--verifier", workshop.values["verifier"]]
        assert main([*words, "--model.draft.draft_vocab_size=64", "--output", str(output)]) == 0
        assert len(FeatureStore(output).kept) == 8

    def test_sources_take_the_place_of_those_that_do_not_exist(self, workshop, capfd):
        """The command that is printed at the end runs as it is."""
        missing = [f"--data.{split}={workshop.folder / 'nowhere.jsonl'}" for split in ("train", "validation")]
        source = workshop.values["data"]["validation"]
        words = ["--config", str(workshop.config), *missing]
        assert main(["prepare", "features", source, "--output", str(workshop.folder / "out"), *words]) == 0
        program, *command = shlex.split(capfd.readouterr().out.splitlines()[-1])
        assert program == "specforge" and main([*command, "--trainer.max_steps=1"]) == 0

    def test_imports_states_that_a_server_wrote(self, workshop, stores, shared):
        verifier = load_verifier(str(VERIFIER))
        (workshop.folder / "served").mkdir()
        for number, row in enumerate(rows("validation.jsonl", 8)):
            tokens = torch.tensor(row["input_ids"])
            found = teacher.capture(verifier, tokens[None], torch.arange(len(tokens))[None], [2, 4, 5])
            states = torch.cat([found.aux[0], found.last[0, :, None]], dim=1)
            save_file({"hidden_states": states, "token_ids": tokens}, workshop.folder / f"served/{number}.safetensors")
        words = ["prepare", "features", workshop.values["data"]["validation"], "--config", str(workshop.config)]
        words += ["--output", str(workshop.folder / "out"), "--from-vllm", str(workshop.folder / "served")]
        assert main([*words, "--dtype", "float32"]) == 0
        imported, own = FeatureStore(workshop.folder / "out"), FeatureStore(stores["float32"])
        digests = imported._digests
        for position, other in zip(imported.locate(digests), own.locate(digests), strict=True):
            assert other >= 0
            for layer in (2, 4, 5, 8):
                torch.testing.assert_close(
                    imported.read(position, layer)[0], own.read(other, layer)[0], rtol=1e-4, atol=1e-4
                )

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "output: is required"),
            (["--output=out"], "no algorithm is chosen"),
            (["nowhere.jsonl", "--output=out"], "sources: nowhere.jsonl does not exist"),
            (["--output=out", "--verify"], "out is not a feature store"),
            (["--output=out", "--dtype=int4"], "--dtype: invalid choice: 'int4'"),
            (["--output=out", "--batch_tokens=0"], "must be a number of at least 1, got '0'"),
            (["--output=out", "--algorithm=eagle3", "--modell.x=1"], "unknown key 'modell.x'. Did you mean 'model'?"),
        ],
    )
    def test_a_fault_is_one_line(self, tmp_path, monkeypatch, capfd, words, message):
        monkeypatch.chdir(tmp_path)
        assert main(["prepare", "features", *words]) == 2
        shown = capfd.readouterr().err.strip()
        assert message in shown and "Traceback" not in shown and len(shown.splitlines()) == 1
