"""The acceptance length of a run, exact or a proxy depending on the rows; and the choice of checkpoints by it."""

from __future__ import annotations

import pytest
import torch
from quickstart_runs import TTT_STEPS, VERIFIER, rows
from training_runs import scalars, weights, write_rows

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.decoding.loop import Decoder
from specforge.proposals import GreedyTokenProposalConfig

VALIDATION_ROWS = 8


@pytest.fixture(scope="module")
def run(shared):
    """A finished run of 16 steps with a validation after every four."""
    words = ["--trainer.max_steps=16", "--trainer.val_check_interval=4"]
    assert main(["fit", *shared.words("runs", *words)]) == 0
    return shared.run_folder("runs")


def test_equals_that_of_real_decoding_with_the_written_draft(run):
    draft = SpeculatorModel.from_pretrained(run / "draft", verifier=str(VERIFIER))
    prompts = []
    for row in rows("validation.jsonl", VALIDATION_ROWS):
        prompts.append(torch.tensor(row["input_ids"][: row["loss_mask"].index(1)]))
    for chain, tag in ((TTT_STEPS, "val/acceptance_length"), (2, "val/acceptance_length_at_2")):
        decoder = Decoder(draft.verifier, draft, GreedyTokenProposalConfig(speculative_tokens=chain))
        rounds = [emission for emission in decoder.decode(prompts, max_new_tokens=96) if emission.drafted is not None]
        measured = sum(len(emission.tokens) for emission in rounds) / len(rounds)
        best = max(scalars(run, "val/acceptance_length"), key=lambda step_and_value: step_and_value[1])
        reported = dict(scalars(run, tag))[best[0]]
        assert measured == pytest.approx(reported, rel=1e-5)


def test_rates_by_position_add_up_to_it(run):
    rates = [dict(scalars(run, f"val/accept_rate_pos_{position}")) for position in range(1, TTT_STEPS + 1)]
    conditional = [dict(scalars(run, f"val/accept_rate_cond_{position}")) for position in range(1, TTT_STEPS + 1)]
    for step, tau in scalars(run, "val/acceptance_length"):
        assert 1 + sum(rate[step] for rate in rates) == pytest.approx(tau, rel=1e-5)
        assert conditional[0][step] == pytest.approx(rates[0][step])
        assert conditional[1][step] * rates[0][step] == pytest.approx(rates[1][step], abs=1e-6)


def test_best_checkpoint_has_the_longest(run):
    best = max(scalars(run, "val/acceptance_length"), key=lambda step_and_value: step_and_value[1])
    # TensorBoard counts steps from 0; a checkpoint stores the number of completed steps.
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == best[0] + 1


@pytest.mark.parametrize("origin", [None, "another model", "mixed"])
def test_is_a_proxy_on_rows_of_other_origin(workshop, fit, capfd, origin):
    changed = rows("validation.jsonl", VALIDATION_ROWS)
    for number, row in enumerate(changed):
        if origin is None:
            del row["origin"]
        elif origin == "another model":
            row["origin"] = {"model": "somebody else's", "fingerprint": "0" * 16, "temperature": 0.0}
        elif number % 2:
            row["origin"] = {**row["origin"], "temperature": 1.0}
    workshop.values["data"]["validation"] = str(write_rows(workshop.folder / "other.jsonl", changed))
    run = fit("runs", "--trainer.max_steps=8")
    shown = capfd.readouterr().out
    assert scalars(run, "val/acceptance_length_proxy")
    with pytest.raises(KeyError):
        scalars(run, "val/acceptance_length")
    assert "val/acceptance_length_proxy is not exact" in shown
    assert ("somebody else's" in shown) == (origin == "another model")
    assert weights(run / "checkpoints" / "best.ckpt")


def test_drawn_chains_are_reported_on_sampled_rows(workshop, fit):
    # The rows were not sampled at this temperature; only the names of the figures are tested.
    changed = rows("validation.jsonl", VALIDATION_ROWS)
    for row in changed:
        row["origin"] = {**row["origin"], "temperature": 0.8, "top_k": 40}
    workshop.values["data"]["validation"] = str(write_rows(workshop.folder / "sampled.jsonl", changed))
    run = fit("runs", "--trainer.max_steps=8")
    greedy, drawn = scalars(run, "val/acceptance_length"), scalars(run, "val/acceptance_length_sampled")
    assert len(greedy) == len(drawn) == 1
    assert 1 < drawn[0][1] < TTT_STEPS + 1 and drawn[0][1] != greedy[0][1]


def test_a_wrong_origin_is_refused_with_its_line(workshop, capfd):
    changed = rows("validation.jsonl", VALIDATION_ROWS)
    changed[2]["origin"] = {"model": "x", "fingerprint": "y", "temperature": -1}
    path = write_rows(workshop.folder / "wrong.jsonl", changed)
    workshop.values["data"]["validation"] = str(path)
    assert main(["fit", *workshop.words("runs")]) == 2
    message = capfd.readouterr().err
    assert f"{path}:3: origin: temperature" in message


def test_early_stopping_can_watch_it(workshop, fit):
    workshop.values["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            # No validation improves by that much, so the second one stops the run.
            "init_args": {"monitor": "val/acceptance_length", "mode": "max", "patience": 1, "min_delta": 9.0},
        }
    ]
    run = fit("runs", "--trainer.max_steps=16", "--trainer.val_check_interval=4")
    assert [step for step, _ in scalars(run, "val/acceptance_length")] == [3, 7]


def test_validate_reports_it(run, shared, capfd):
    assert main(["validate", *shared.words("runs")]) == 0
    assert "val/acceptance_length" in capfd.readouterr().out
