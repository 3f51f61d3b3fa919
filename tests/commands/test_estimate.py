from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from specforge.__main__ import main
from specforge.commands.units import in_units

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
GIVEN = ["--tokens", "1000000", "--supervised_share", "0.5", "--device_flops", "1e12"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose verifier is only a config.json, and whose rows do not exist yet."""
    verifier = tmp_path / "verifier"
    verifier.mkdir()
    shutil.copy(QUICKSTART / "verifier" / "config.json", verifier)
    values = {
        "algorithm": "eagle3",
        "verifier": str(verifier),
        "trainer": {"accelerator": "cpu", "max_epochs": 2},
        "model": {"ttt_steps": 2, "draft": {"draft_vocab_size": 256}},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def estimated(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["estimate", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str, command: str = "estimate") -> str:
    assert main([command, *words]) == 2
    return capsys.readouterr().err.partition("error: ")[2]


class TestOutput:
    def test_a_config_is_enough(self, config, capsys):
        out = estimated(capsys, "--config", str(config), *GIVEN)
        assert re.search(r"tokens per epoch\s+1,000,000 ", out)
        assert re.search(r"supervised\s+50\.0%", out)
        # 15,625 rows of 64 tokens, twice.
        assert re.search(r"optimizer steps \(1 row per batch\)\s+31,250", out)
        assert re.search(r"bfloat16\s+512 B\s+512\.00 MB", out)
        assert re.search(r"int8 and scales\s+272 B\s+272\.00 MB", out)
        assert re.search(r"15% to 80% utilised\s+1\.00 TFLOP/s", out)

    @pytest.mark.parametrize("algorithm", ["eagle", "mlp"])
    def test_every_algorithm(self, algorithm, config, capsys):
        values = yaml.safe_load(config.read_text()) | {"algorithm": algorithm}
        del values["model"]
        config.write_text(yaml.safe_dump(values))
        out = estimated(capsys, "--config", str(config), *GIVEN)
        assert out.startswith(f"{algorithm}: ")
        assert re.search(r"bfloat16\s+128 B", out), "only the last state"

    def test_fits_80_columns(self, config, capsys):
        out = estimated(capsys, "--config", str(config), *GIVEN)
        assert max(map(len, out.partition("To start it")[0].splitlines())) <= 80

    def test_the_last_line_starts_the_run(self, config, capsys):
        out = estimated(capsys, "--config", str(config), *GIVEN, "--model.ttt_steps=3")
        assert out.splitlines()[-1] == f"  specforge fit --config {config} --model.ttt_steps=3"

    def test_rows_that_are_missing_are_named_before_the_command(self, config, capsys):
        out = estimated(capsys, "--config", str(config), *GIVEN)
        assert "To start it, once there are rows (data.train: " in out and "rows.jsonl does not exist" in out

    def test_what_does_not_fit_is_named_with_what_would(self, config, capsys):
        flags = ["--device_memory", "1e6", "--trainer.devices", "4", "--trainer.accelerator", "gpu"]
        out = estimated(capsys, "--config", str(config), *GIVEN, *flags)
        assert "It does not fit" in out and "1.00 MB" in out and "specforge fit" not in out

    def test_a_split_verifier(self, config, capsys):
        """Each device keeps embeddings, norm and head, a quarter of the layers, and two gathered ones."""
        flags = ["--verifier_sharding", "true", "--trainer.devices", "4", "--trainer.accelerator", "gpu"]
        out = " ".join(
            estimated(capsys, "--config", str(config), *GIVEN, *flags, "--verifier_dtype", "float32").split()
        )
        with torch.device("meta"):
            verifier = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(QUICKSTART / "verifier"))
        layers = [sum(4 * one.numel() for one in layer.parameters()) for layer in verifier.model.layers]
        assert f"receives {in_units(sum(layers) * 3 // 4, 'B')} of the split verifier's layers" in out
        assert "split over 4 devices and two gathered at a time" in out

    def test_another_device_keeps_the_stored_type(self, config, capsys):
        flags = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.precision", "bf16-mixed"]
        out = estimated(capsys, "--config", str(config), *GIVEN, *flags)
        assert "8 devices" in out
        assert "25% to 50% utilised" in out
        stored = json.loads((QUICKSTART / "verifier" / "config.json").read_text())["dtype"]
        assert f"verifier in {stored}, precision bf16-mixed" in " ".join(out.split())

    def test_costs_named_by_a_plugin(self, config, capsys):
        values = yaml.safe_load(config.read_text()) | {"algorithm": "mlp", "model": {"stage_two": {"begin": 0.5}}}
        config.write_text(yaml.safe_dump(values))
        out = estimated(capsys, "--config", str(config), *GIVEN)
        assert "The verifier's generation of up to 256 tokens" in " ".join(out.split())

    def test_help(self, capsys):
        out = estimated(capsys, "--help")
        assert "--device_flops F" in out
        assert "specforge estimate --config configs/quickstart.yaml" in out


class TestRows:
    def test_a_small_file_is_counted(self, tmp_path, config, capsys, monkeypatch):
        monkeypatch.setattr("specforge.estimation.device.SECONDS", 0.01)
        mask = [0] * 8 + [1] * 24
        rows = [{"input_ids": [number, *range(2, 33)], "loss_mask": mask} for number in range(10)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = ["--data.validation_share", "0.2", "--data.cache_dir", str(tmp_path / "cache")]
        out = estimated(capsys, "--config", str(config), *flags)
        assert re.search(r"tokens per epoch\s+256 ", out), "8 rows of 32 tokens; two are held out"
        assert re.search(r"supervised\s+75\.0%", out)
        assert re.search(r"rows of up to 64 tokens\s+4 ", out)

    def test_a_large_file_is_counted_only_if_it_is_built(self, tmp_path, config, capsys, monkeypatch):
        mask = [0] * 8 + [1] * 24
        rows = [{"input_ids": [number, *range(2, 33)], "loss_mask": mask} for number in range(10)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = ["--config", str(config), "--data.cache_dir", str(tmp_path / "cache"), "--device_flops", "1e12"]
        monkeypatch.setattr("specforge.estimation.text.SMALL_FILE", 100)
        message = refused(capsys, *words)
        assert "is not counted yet" in message
        assert "--tokens" in message
        assert not (tmp_path / "cache").exists()
        with monkeypatch.context() as patch:
            patch.setattr("specforge.estimation.text.SMALL_FILE", 10**6)
            first = estimated(capsys, *words)
        assert estimated(capsys, *words) == first


class TestErrors:
    @pytest.mark.parametrize(
        "flags",
        [
            ["--model.ttt_step", "3"],
            ["--model.draft.draft_vocab_size", "none"],
            ["--trainer.precision", "8"],
            ["--model.draft.draft_vocab_size", "999999"],
            ["--verifier", "no-such-folder"],
        ],
    )
    def test_are_those_of_fit(self, flags, config, capsys):
        words = ["--config", str(config), *flags]
        assert refused(capsys, *words) == refused(capsys, *words, command="fit")

    def test_a_wrong_key_in_the_file_is_named_with_its_line(self, config, capsys):
        config.write_text(config.read_text().replace("ttt_steps", "ttt_step"))
        message = refused(capsys, "--config", str(config), *GIVEN)
        line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "ttt_step" in text)
        assert f"unknown key 'model.ttt_step' ({config}:{line})" in message
        assert "'model.ttt_steps'" in message

    def test_missing_rows(self, config, capsys):
        assert "rows.jsonl does not exist" in refused(capsys, "--config", str(config))

    def test_no_end(self, config, capsys):
        flags = ["--trainer.max_epochs", "-1"]
        assert "set trainer.max_steps or trainer.max_epochs" in refused(capsys, "--config", str(config), *GIVEN, *flags)

    @pytest.mark.parametrize(
        "flags", [["--tokens", "0"], ["--supervised_share", "1.5"], ["--device_flops", "-1"], ["--device_flops", "x"]]
    )
    def test_own_flags_have_bounds(self, flags, config, capsys):
        assert flags[0].removeprefix("--") in refused(capsys, "--config", str(config), *flags)

    def test_nothing_chosen(self, capsys):
        assert "no algorithm is chosen" in refused(capsys)
