"""Several commands in one process, and plugins."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from quickstart_runs import DIVERGING
from training_runs import scalars

from specforge.__main__ import main
from specforge.registry import installed


def test_runs_in_one_process_do_not_pile_up_filters(workshop, fit):
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector")

    def number() -> int:
        return sum(len(logging.getLogger(name).filters) for name in names) + len(warnings.filters)

    fit("first", "--trainer.max_steps=1")
    before = number()
    fit("second", "--trainer.max_steps=1")
    assert number() == before


def test_the_second_run_of_a_process_equals_the_first(workshop, fit):
    first, second = (fit(name, "--trainer.max_steps=3") for name in ("first", "second"))
    assert scalars(first, "train/loss") == scalars(second, "train/loss")


def test_a_failed_run_does_not_affect_the_next(workshop, fit):
    assert main(["fit", *workshop.words("failed", "--model.ttt_steps=0")]) == 2
    assert main(["fit", *workshop.words("failed", *DIVERGING)]) == 1
    after, expected = (fit(name, "--trainer.max_steps=3") for name in ("after", "expected"))
    assert scalars(after, "train/loss") == scalars(expected, "train/loss")


class TestExternalPlugin:
    """A package outside the project trains through the same command."""

    @pytest.fixture(autouse=True)
    def _install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        site = tmp_path / "site"
        (site / "toy_package-0.1.dist-info").mkdir(parents=True)
        (site / "toy_package-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n")
        entry = "[specforge.plugins]\ntoy = toy_for_end_to_end\n"
        (site / "toy_package-0.1.dist-info" / "entry_points.txt").write_text(entry)
        (site / "toy_for_end_to_end.py").write_text(
            "from specforge.hookspecs import Algorithm, Objective, hookimpl\n"
            "@hookimpl\n"
            "def specforge_objectives():\n"
            "    return [Objective('double_kl', 'twice the KL', 'toy_for_end_to_end:double_kl')]\n"
            "@hookimpl\n"
            "def specforge_algorithms():\n"
            "    return [Algorithm('toyalgo', 'a toy', 'specforge_eagle3.config:Eagle3SpeculatorConfig',\n"
            "        'specforge_eagle3.model:Eagle3DraftModel', 'specforge_eagle3.module:Eagle3Module',\n"
            "        'specforge.data.module:DraftDataModule')]\n"
            "def double_kl(rows):\n"
            "    return 2 * (rows.log_p.exp() * (rows.log_p - rows.log_q)).sum(-1)\n"
        )
        monkeypatch.syspath_prepend(str(site))
        installed.cache_clear()
        yield
        monkeypatch.undo()
        installed.cache_clear()

    def test_objective(self, workshop, fit):
        double = fit("double", '--model.objective={"double_kl": 1.0}', "--trainer.max_steps=2")
        own = fit("own", "--trainer.max_steps=2")
        first, other = scalars(double, "train/loss")[0][1], scalars(own, "train/loss")[0][1]
        assert first == pytest.approx(2 * other, rel=1e-5)
        assert scalars(double, "train/double_kl/step_0")

    def test_algorithm(self, workshop, fit, capfd):
        workshop.values["algorithm"] = "toyalgo"
        run = fit("runs", "--trainer.max_steps=1")
        assert "algorithm: toyalgo" in (run / "config.yaml").read_text()
        assert main(["validate", *workshop.words("runs")]) in (0, 2)

    def test_default_folder_is_that_of_the_algorithm(self, workshop, monkeypatch):
        monkeypatch.chdir(workshop.folder)
        workshop.values["algorithm"] = "toyalgo"
        del workshop.values["output_dir"]
        assert main(["fit", "--config", str(workshop.config), "--trainer.max_steps=1"]) == 0
        assert (workshop.folder / "runs" / "toyalgo" / "version_0" / "draft" / "config.json").is_file()
