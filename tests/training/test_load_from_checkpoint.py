"""Lightning's ``load_from_checkpoint`` restores module and data of a run, for every algorithm."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from small_runs import ALGORITHMS, SmallRuns, logged, weights

from specforge.__main__ import main
from specforge.data.module import DraftDataModule
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.models.scaled_linear import folded
from specforge.registry import installed
from specforge.training.module import DraftModule

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_verifiers: Mapping[str, Any]) -> SmallRuns:
    """A short run of every algorithm, with one validation at its end."""
    draw = random.Random(0)
    trainer = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": False}
    values = {"trainer": trainer, "data": {"max_length": 48, "batch_size": 4, "packing": False}}
    made = SmallRuns(tmp_path_factory.mktemp("loaded"), tiny_verifiers["llama"].folder, values)
    for split, number in (("train", 8), ("validation", 3)):
        lengths = [draw.randint(8, 40) for _ in range(number)]
        made.write(
            split,
            [([draw.randrange(3, 61) for _ in range(length)], [0] * 3 + [1] * (length - 3)) for length in lengths],
        )
    for algorithm in ALGORITHMS:
        more = ["--model.stage_two=null"] if algorithm == "mlp" else []
        assert main(made.words(algorithm, algorithm, *more)) == 0
    return made


def load(path: Path, algorithm: str, **changed: Any) -> tuple[DraftModule, DraftDataModule]:
    """Load module and data with Lightning."""
    descriptor = installed().find(Algorithm, ALGORITHMS[algorithm]["algorithm"])
    module, data = (installed().load(descriptor, kind) for kind in ("module", "data"))
    return module.load_from_checkpoint(path, **changed), data.load_from_checkpoint(path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_module_measures_what_the_run_measured(runs: SmallRuns, algorithm: str) -> None:
    module, data = load(runs.last(algorithm), algorithm)
    found = {f"draft.{name}": tensor for name, tensor in module.draft.state_dict().items()}
    expected = folded(weights(runs.last(algorithm)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    trainer = Trainer(**QUIET, inference_mode=False)
    [figures] = trainer.validate(module, data, verbose=False)
    before = {tag: values[-1] for tag, values in logged(runs.run(algorithm)).items() if tag.startswith("val/")}
    assert figures == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["eagle3", "mlp"])
def test_a_loaded_module_is_trained_from_its_weights(
    runs: SmallRuns, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, data = load(runs.last(algorithm), algorithm)
    before = {name: tensor.clone() for name, tensor in module.draft.state_dict().items()}
    module.optimizer_settings = module.optimizer_settings.model_copy(update={"lr": 1e-12})
    trainer = Trainer(**QUIET, enable_checkpointing=False, max_steps=2, limit_val_batches=0)
    trainer.fit(module, data)
    assert "starts from the weights of the checkpoint that was loaded" in module.summary_text()
    for name, tensor in folded(module.draft.state_dict()).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_a_loaded_draft_needs_its_verifier_only_to_run(runs: SmallRuns) -> None:
    module, _ = load(runs.last("eagle3"), "eagle3")
    assert not module.teacher.is_held and module.draft.verifier is None
    module.draft.attach_verifier(str(runs.verifier))
    assert module.draft.generate(torch.tensor([[5, 9, 12]]), max_new_tokens=4, eos_token_id=[]).shape == (1, 7)


def test_settings_are_those_of_the_run_except_given_ones(runs: SmallRuns) -> None:
    module, data = load(runs.last("eagle3"), "eagle3", step_decay=0.5)
    assert (module.num_steps, module.settings.draft_vocab_size, module.optimizer_settings.lr) == (3, 40, 3e-3)
    assert module.step_decay == 0.5 and data.row_settings.max_length == 48


def test_a_checkpoint_of_an_earlier_version_is_refused(runs: SmallRuns, tmp_path: Path) -> None:
    content = torch.load(runs.last("eagle"), weights_only=True)
    del content["draft_config"]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(UsageError, match="earlier version"):
        load(tmp_path / "old.ckpt", "eagle")
