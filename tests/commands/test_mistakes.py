"""Typical mistakes of new users, and their error messages."""

from __future__ import annotations

import pytest
from jsonargparse import capture_parser

from specforge.__main__ import main
from specforge.commands.estimate.estimating import EstimateCLI
from specforge.commands.trainer import choose
from specforge.training.cli.command_line import parse

CONFIG = "configs/quickstart.yaml"
SEE = "see: specforge {} --help"


@pytest.mark.parametrize(
    ("words", "command", "expected"),
    [
        (["fit"], "fit", ["no algorithm is chosen", "--config FILE", "--algorithm"]),
        (["fit", CONFIG], "fit", [f"--config {CONFIG}"]),
        (["fit", "--config"], "fit", ["--config needs a value"]),
        (["fit", "--config", CONFIG, "more.yaml"], "fit", ["unexpected argument 'more.yaml'", SEE.format("fit")]),
        (["fit", "--config", CONFIG, "--model.ttt_steps"], "fit", ["--model.ttt_steps needs a value"]),
        (["fit", "--config", CONFIG, "--model.ttt_steps", "three"], "fit", ["expected an integer, got 'three'"]),
        (["fit", "--config", CONFIG, "--lr", "1e-3"], "fit", ["unknown key 'lr'", "'model.optimizer.lr'"]),
        (["fit", "--config", CONFIG, "--epochs", "3"], "fit", ["Did you mean 'trainer.max_epochs' or"]),
        (["fit", "--config", CONFIG, "--learning_rate", "1e-3"], "fit", ["Did you mean 'model.optimizer.lr'?"]),
        (["fit", "--config", CONFIG, "--num_epochs", "3"], "fit", ["Did you mean 'trainer.max_epochs' or"]),
        (["fit", "--config", CONFIG, "--max_steps", "9"], "fit", ["Did you mean 'trainer.max_steps'?"]),
        (["fit", "--config", CONFIG, "--warmup_steps", "9"], "fit", ["Did you mean 'model.schedule.warmup'?"]),
        (["fit", "--config", CONFIG, "--seed", "9"], "fit", ["Did you mean 'seed_everything'?"]),
        (
            ["fit", "--config", CONFIG, "--verifier", "configs/quickstart/verifer"],
            "fit",
            ["configs/quickstart/verifer is not a folder", "Did you mean 'configs/quickstart/verifier'?"],
        ),
        (["fit", "--config", "configs/quikstart.yaml"], "fit", ["Did you mean 'configs/quickstart.yaml'?"]),
        (["fit", "--config", "configs/quickstart"], "fit", ["is a folder", "Did you mean 'configs/quickstart.yaml'?"]),
        (
            ["fit", "--config", CONFIG, "--verifier", "configs/quickstart/verifier/config.json"],
            "fit",
            ["config.json is a file; give the folder or hub id that holds config.json"],
        ),
        (
            ["fit", "--config", CONFIG, "--data.train", "configs/quickstart/trian.jsonl"],
            "fit",
            ["does not exist", "Did you mean 'configs/quickstart/train.jsonl'?"],
        ),
        (["fit", "--config", CONFIG, "--resume", "last"], "fit", ["Did you mean 'ckpt_path'?"]),
        (["fit", "--config", CONFIG, "--resume_from_checkpoint", "x.ckpt"], "fit", ["Did you mean 'ckpt_path'?"]),
        (["fit", "--config", CONFIG, "--device", "cuda"], "fit", ["Did you mean 'trainer.accelerator'?"]),
        (["fit", "--config", CONFIG, "--wandb"], "fit", ["Did you mean 'trainer.logger'?"]),
        (["fit", "--config", CONFIG, "--trainer.logger", "wandb"], "fit", ["Did you mean 'WandbLogger'?"]),
        (["fit", "--config", CONFIG, "--trainer.devices", "0"], "fit", ["expected an integer of at least 1, -1 for"]),
        (["generate", "draft", "--temp", "1"], "generate", ["unknown key 'temp'. Did you mean 'temperature'?"]),
        (["evaluate", "--prompts", "a.jsonl", "--limit", "0"], "evaluate", ["limit: must be >0, got 0"]),
        (["fit", "--algorithm", "eagle-3"], "fit", ["eagle3"]),
        (["fit", "--config", CONFIG, "--model.objective.KL", "1"], "fit", ["'KL'", "Did you mean 'kl'?"]),
        (["generate", "configs/quickstart/verifier"], "generate", ["verifier"]),
        (["fit", "--config", CONFIG, "--batch_size", "4"], "fit", ["Did you mean 'data.batch_size'?"]),
        (["fit", "--config", CONFIG, "--model.objective", "kl"], "fit", ["values such as {kl: 1.0}, got 'kl'"]),
        (["fit", "--config", CONFIG, "--trainer.max_steps", "1.5e0"], "fit", ["expected an integer, got '1.5'"]),
        (
            ["fit", "--config", CONFIG, "--data.train", "data/mine/train"],
            "fit",
            ["does not exist", "specforge prepare rows SOURCE --verifier MODEL --output data/mine"],
        ),
        (
            ["prepare", "rows", "data/mine/responses.jsonl", "--verifier", "MODEL", "--output", "rows"],
            "prepare rows",
            ["does not exist", "specforge prepare responses PROMPTS --verifier MODEL --output data/mine"],
        ),
        (["estimate", "--config", CONFIG, "--tokens", "many"], "estimate", ["tokens: expected an integer, got 'many'"]),
        (["prepare", "row"], "prepare", ["unknown subcommand 'row'", "Did you mean 'rows'?"]),
        (["prepare", "rows"], "prepare rows", ["sources: none are given"]),
        (["prepare", "rows", "a.jsonl", "--verifier"], "prepare rows", ["--verifier needs a value"]),
        (["prepare", "rows", "a.jsonl", "--max_length", "x"], "prepare rows", ["max_length: expected an integer"]),
        (
            ["prepare", "rows", "configs/quickstart/train.jsonl", "--verifier", "MODEL", "--output", "rows.jsonl"],
            "prepare rows",
            ["--output: rows.jsonl is not a folder name"],
        ),
        (["prepare", "check"], "prepare check", ["rows: none are given"]),
        (["prepare", "check", "a.jsonl"], "prepare check", ["verifier: is required", "--verifier"]),
        (["prepare", "responses"], "prepare responses", ["sources: none are given"]),
        (["prepare", "features"], "prepare features", ["output: is required"]),
        (["generate"], "generate", ["draft: none is given", "--proposal prompt_lookup"]),
        (["generate", "draft", "other"], "generate", ["unexpected argument 'other'", SEE.format("generate")]),
        (["evaluate"], "evaluate", ["required: --prompts", SEE.format("evaluate")]),
        (["export"], "export", ["required: DRAFT; ", SEE.format("export")]),
        (["convert", "draft"], "convert", ["required: --verifier"]),
        (["verify"], "verify", ["required: EXPORT"]),
        (["plugins", "chek"], "plugins", ["there is no 'chek'; known: new, check. Did you mean 'check'?"]),
        (["plugins", "check"], "plugins", ["required: NAME; see: specforge plugins check --help"]),
        (["plugins", "new"], "plugins", ["required: NAME; see: specforge plugins new --help"]),
        (["plugins", "--minimal"], "plugins", ["unexpected argument '--minimal'", SEE.format("plugins")]),
        (["completion"], "completion", ["required: shell", SEE.format("completion")]),
        (["completion", "csh"], "completion", ["there is no 'csh'; known: bash, ", "Did you mean 'tcsh'?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_says_what_to_do(words, command, expected, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith(f"specforge {command}: error: ") and not shown.out
    assert all(part in line for part in expected), line


@pytest.mark.parametrize(("word", "meant"), [("train", "fit"), ("help", "--help")])
def test_words_of_other_programs(word, meant, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err == f"specforge: error: there is no command '{word}'. Did you mean '{meant}'?\n"


def test_a_folder_of_runs_is_not_a_draft(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"version_{number}" / "draft").mkdir(parents=True)
    assert main(["export", str(tmp_path), "--format", "vllm"]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} is a folder of runs; give one of: {tmp_path / 'version_0'}, " in message


def test_a_part_of_a_run_is_not_a_draft(tmp_path, capsys):
    run = tmp_path / "quickstart" / "version_0"
    for folder in ("draft", "checkpoints"):
        (run / folder).mkdir(parents=True)
    for file in ("config.yaml", "checkpoints/last.ckpt"):
        (run / file).touch()
    for part in ("checkpoints", "checkpoints/last.ckpt"):
        assert main(["export", str(run / part), "--format", "vllm"]) == 2
        assert f"{run / part} is a part of a run; give the run's folder: {run}\n" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "vllm"]) == 2
    assert f"{tmp_path} is a folder of runs; give one of: {run}\n" in capsys.readouterr().err


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_without_its_build(capsys, monkeypatch, accelerator):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    assert main(["fit", "--config", CONFIG, "--trainer.accelerator", accelerator]) == 2
    message = capsys.readouterr().err
    assert f"accelerator: {accelerator} is not available: torch " in message
    assert "is built without GPUs. Set auto" in message


@pytest.mark.parametrize(("flag", "given", "stored"), [("tokens", "1e9", 10**9), ("trainer.max_steps", "1e3", 1000)])
def test_whole_numbers_may_have_an_exponent(flag, given, stored):
    algorithm = choose(["--config", CONFIG], "")
    parser = capture_parser(EstimateCLI, algorithm, [], "estimate")
    for words in ([f"--{flag}", given], [f"--{flag}={given}"]):
        assert parse(parser, ["--config", CONFIG, *words])[flag] == stored


def test_whole_numbers_of_a_file_may_have_an_exponent(tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("trainer: {max_steps: 2e3}  # 1e1\nmodel:\n  optimizer: {lr: 3e-4, options: {}}\nrun_name: '1e3'\n")
    parser = capture_parser(EstimateCLI, choose(["--config", CONFIG], ""), [], "estimate")
    found = parse(parser, ["--config", CONFIG, "--config", str(file)])
    assert (found.trainer.max_steps, found.model.optimizer.lr, found.run_name) == (2000, 3e-4, "1e3")


def test_texts_are_not_numbers():
    parser = capture_parser(EstimateCLI, choose(["--config", CONFIG], ""), [], "estimate")
    assert parse(parser, ["--config", CONFIG, "--run_name", "1e3"]).run_name == "1e3"


@pytest.mark.parametrize(("command", "rows"), [("validate", "data.validation"), ("test", "data.test")])
def test_help_says_what_is_measured(command, rows, capsys):
    assert main([command, "--help"]) == 0
    assert f"Measure a checkpoint of a run on {rows}" in " ".join(capsys.readouterr().out.split())
