"""The inputs of the published trainers in benchmarks/outcome, and the measurement of their drafts."""

from __future__ import annotations

import pytest
import torch
from capturing import Run, write_rows
from learning import Learner, learn
from measuring import decoded, replayed
from quickstart_runs import TTT_STEPS
from tables import Figures, decoded_table, trained_table
from training import Trained
from training_runs import scalars

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.training.module import DraftModule
from specforge.verifier.parts import VerifierParts

STEPS = 12


@pytest.fixture(scope="module")
def seen():
    """Batch and states of every training step."""
    return []


@pytest.fixture(scope="module")
def run(shared, seen):
    """A finished run of an epoch and a half, two packed rows a step."""
    step = DraftModule.training_step

    def training_step(self, batch, batch_idx):
        seen.append((batch, self.features(batch)))
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftModule, "training_step", training_step)
        assert main(["fit", *shared.words("runs", "--trainer.val_check_interval=4")]) == 0
    return Run(shared.run_folder("runs"))


@pytest.fixture(scope="module")
def rows(run, tmp_path_factory):
    return write_rows(run, tmp_path_factory.mktemp("outcome") / "rows")


@pytest.fixture(scope="module")
def length(run):
    """The acceptance length that the run reported for its draft."""
    return max(value for _, value in scalars(run.draft.parent, "val/acceptance_length"))


def figures(run, **replay):
    trained = Trained("speculators", 0.02, 42, run.draft, 7.0)
    return Figures(trained, {"validation": replay})


def test_peers_get_what_every_step_of_our_run_read(rows, seen):
    assert len(rows.order) == len(seen) == STEPS
    for step, (batch, features) in enumerate(seen):
        documents, real = rows.documents(step), batch["document_ids"] >= 0
        for name, ours in (*batch.items(), ("aux", features.aux), ("last", features.last)):
            if name in documents[0]:
                theirs = torch.cat([document[name] for document in documents])
                torch.testing.assert_close(theirs, ours[real], rtol=1e-4, atol=1e-4)
        starts = (batch["position_ids"][real] == 0).nonzero().flatten().tolist()
        lengths = [len(document["input_ids"]) for document in documents]
        assert starts == [sum(lengths[:number]) for number in range(len(lengths))]


def test_peers_get_the_states_that_a_run_read_from_a_store(run, rows, tmp_path):
    store = tmp_path / "features"
    words = ["--config", str(run.draft.parent / "config.yaml"), "--output", str(store), "--dtype", "int8"]
    assert main(["prepare", "features", *words]) == 0
    stored = Run(run.draft.parent)
    stored.settings["data"]["features"] = str(store)
    theirs, live = write_rows(stored, tmp_path / "rows").documents(0)[0], rows.documents(0)[0]
    # No state after the last supervised token is stored.
    read = int(live["loss_mask"].nonzero().max()) + 1
    for name in ("aux", "last"):
        difference = (theirs[name][:read] - live[name][:read]).abs().max() / live[name][:read].abs().max()
        assert 0 < difference < 1 / 127


def test_peers_get_the_draft_vocabulary_and_the_verifiers_parts(run, rows):
    draft = SpeculatorModel.from_pretrained(run.draft, verifier=run.verifier_name)
    assert torch.equal(rows.t2d, draft.t2d)
    assert torch.equal(rows.d2t, draft.d2t)
    assert rows.aux_layers == draft.aux_layers
    states = rows.documents(0)[0]["last"]
    theirs = VerifierParts.from_pretrained(str(rows.verifier)).logits(states)
    torch.testing.assert_close(theirs, VerifierParts.of(run.verifier()).logits(states))


def test_a_peer_takes_every_step_and_writes_its_draft(rows, monkeypatch, tmp_path):
    class Counting(Learner):
        def __init__(self, given, rate):
            self.weight, self.rate, self.tokens = torch.zeros((), requires_grad=True), rate, []

        def loss(self, documents):
            self.tokens.append(sum(len(document["input_ids"]) for document in documents))
            return self.weight * self.tokens[-1]

        def update(self):
            self.weight.data -= self.rate * self.weight.grad
            self.weight.grad = None

        def save(self, folder):
            folder.write_text(f"{self.weight.item():.0f} {len(self.tokens)}")

    words = ["script", rows.folder, "--rate", "2", "--seed", "1", "--output", str(tmp_path / "draft")]
    monkeypatch.setattr("sys.argv", words)
    learn(Counting)
    tokens = sum(len(document["input_ids"]) for step in range(STEPS) for document in rows.documents(step))
    assert (tmp_path / "draft").read_text() == f"{-2 * tokens} {STEPS}"


def test_replay_equals_the_runs_figure(run, length):
    validation = run.data().validation_rows
    once, again = replayed([run.draft, run.draft], run.verifier(), validation, TTT_STEPS)
    assert once == again
    assert once["acceptance_length"] == pytest.approx(length, rel=1e-6)
    *_, line = trained_table([figures(run, **once)], TTT_STEPS)
    rates = " ".join(f"{once[f'accept_rate_pos_{position}']:.3f}" for position in range(1, TTT_STEPS + 1))
    assert line == f"| speculators 0.9.0 | 0.02 | 42 | {length:.3f} | {rates} | 7 s |"


def test_decoding_reports_the_same_in_its_table(run, length, tmp_path):
    shapes = [f"greedy:speculative_tokens={TTT_STEPS}", f"dynamic_tree:depth={TTT_STEPS}"]
    source = run.settings["data"]["validation"]
    results = decoded([run.draft], run.verifier_name, [source], shapes, 0.0, None, tmp_path / "report")
    tree = results.contenders[1].all_sets.acceptance_length
    head, _, line = decoded_table([figures(run, acceptance_length=length)], [results])
    assert "chain, T = 0 | tree, T = 0" in head
    both = f"{length:.2f} | {length:.2f} | {tree:.2f}"
    assert line == f"| speculators 0.9.0 | 0.02 | validation | {both} | 16 of 16 |"
