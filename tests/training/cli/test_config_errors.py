"""Faults of a configuration: one message that names the key, what is allowed and the nearest name; nothing loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from specforge.__main__ import main

Refusal = Callable[..., str]
VOCABULARY = 61
LAYERS = 8


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any, **options: Any) -> None:
        pytest.fail("a model was loaded before the configuration was checked")

    monkeypatch.setattr("specforge.verifier.loading.load_verifier", refuse)
    monkeypatch.setattr("specforge.training.teacher.load_verifier", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Return a complete, valid configuration with a verifier without weights and one row of data."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
    ).save_pretrained(tmp_path / "verifier")
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n' * 3)
    return {
        "algorithm": "eagle3",
        "verifier": str(tmp_path / "verifier"),
        "output_dir": str(tmp_path / "runs"),
        "trainer": {"accelerator": "cpu", "max_steps": 2},
        "model": {"ttt_steps": 2, "draft": {"draft_vocab_size": 16}, "optimizer": {"lr": 1e-3}},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 16, "cache_dir": str(tmp_path / "cache")},
    }


@pytest.fixture
def refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Run ``specforge fit``, check that it refuses in one message, and return the message."""

    def run(*words: str, command: str = "fit") -> str:
        assert main([command, *words]) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        lines = [line for line in shown.err.splitlines() if not line.startswith("Seed set to")]
        assert len(lines) == 1, shown.err
        assert not (tmp_path / "runs").exists(), "a run was started"
        return lines[0].removeprefix(f"specforge {command}: error: ")

    return run


def with_value(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the configuration with one more value at a dotted path."""
    changed = json.loads(json.dumps(base))
    *parents, last = path.split(".")
    inner = changed
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return changed


def write(path: Path, values: Any) -> Path:
    """Write a configuration file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def line_of(file: Path, key: str) -> int:
    """Return the line of a configuration file that holds the last part of a key's path."""
    node, line = yaml.compose(file.read_text(encoding="utf-8")), 0
    for part in key.split("."):
        at, node = next((name, value) for name, value in node.value if name.value == part)
        line = at.start_mark.line + 1
    return line


def flag(path: str, value: Any) -> list[str]:
    """Return the words that give a value on the command line."""
    return [f"--{path}", value if isinstance(value, str) else json.dumps(value)]


# Key, wrong value, and what the message must contain in addition to the key.
PARSED = [
    # misspelt
    ("model.draft.num_layrs", 2, ["unknown key", "'model.draft.num_layers'"]),
    ("model.ttt_step", 2, ["unknown key", "'model.ttt_steps'"]),
    ("model.optimizer.learning_rat", 1.0, ["unknown key", "lr"]),
    ("trainer.acelerator", "cpu", ["unknown key", "'trainer.accelerator'"]),
    ("data.trian", "x.jsonl", ["unknown key", "'data.train'"]),
    ("modle.ttt_steps", 2, ["unknown key", "'model.ttt_steps'"]),
    ("verifer_dtype", "auto", ["unknown key", "'verifier_dtype'"]),
    ("xyzzy", 2, ["unknown key", "model", "trainer", "output_dir"]),
    ("model.draft.xyzzy", 2, ["unknown key", "num_layers", "draft_vocab_size"]),
    # of a wrong type
    ("model.draft.num_layers", "two", ["integer", "'two'"]),
    ("model.draft.num_layers", 1.5, ["integer", "1.5"]),
    ("model.ttt_steps", "two", ["two"]),
    ("model.optimizer.lr", "fast", ["number", "'fast'"]),
    ("model.optimizer.betas", [0.9], ["2", "0.9"]),
    ("model.draft.fc_norm", "yes please", ["true or false", "'yes please'"]),
    ("model.draft.aux_layers", "2", ["list"]),
    ("model.objective", "kl", ["keys and values", "kl"]),
    ("model.objective", {"kl": "x"}, ["number", "x"]),
    ("trainer.max_steps", "x", ["integer", "'x'"]),
    ("seed_everything", "x", ["integer", "'x'"]),
    # out of range
    ("model.draft.num_layers", 0, ["greater than or equal to 1", "0"]),
    ("model.draft.draft_vocab_size", 0, ["greater than or equal to 1", "0"]),
    ("model.ttt_steps", 0, [">=1", "got 0"]),
    ("model.step_decay", 1.5, ["<=1", "1.5"]),
    ("model.step_decay", 0, [">0", "0"]),
    ("model.optimizer.lr", 0, ["greater than 0", "0"]),
    ("model.optimizer.weight_decay", -0.1, ["greater than or equal to 0", "-0.1"]),
    ("model.schedule.final_ratio", 1.5, ["less than or equal to 1", "1.5"]),
    ("data.max_length", 1, [">=2", "1"]),
    ("data.batch_size", 0, [">=1", "0"]),
    ("data.validation_share", 1, ["<1", "1"]),
    ("data.num_workers", -1, [">=0", "-1"]),
    ("save_every_n_steps", 0, [">=1", "0"]),
    # not one of the choices
    ("model.draft.layer_type", "gemma", ["installed: llama, qwen3", "'gemma'"]),
    ("model.supervision", "exactly", ["exact or compat", "'exactly'"]),
    ("model.denominator", "some", ["valid or all", "'some'"]),
    ("model.optimizer.name", "adam", ["give adamw, muon, or the path", "'adam'"]),
    ("model.schedule.name", "cosin", ["give cosine, linear, constant, wsd, or the path", "'cosin'"]),
    ("data.long_rows", "cut", ["truncate or drop", "'cut'"]),
    ("verifier_dtype", "bf16", ["bfloat16", "'bf16'"]),
    ("trainer.precision", "bf17", ["bf16-mixed", "'bf17'"]),
]
# Found by the classes, from values that are valid separately.
BUILT = [
    ("model.draft", {"fc_norm": True, "norm_before_fc": True}, "model.draft", ["exclude each other"]),
    ("verifier", "/nowhere/at/all", "verifier", ["/nowhere/at/all", "not a folder"]),
    ("data.train", "nowhere.jsonl", "data.train", ["nowhere.jsonl does not exist", ".jsonl"]),
    ("data.validation", "nowhere.jsonl", "data.validation", ["nowhere.jsonl does not exist"]),
    ("model.objective", {"kll": 1.0}, "model.objective", ["'kll'", "Did you mean 'kl'?"]),
    ("model.objective", {"xyzzy": 1.0}, "model.objective", ["'xyzzy'", "jsd", "lk_alpha"]),
    ("model.objective", {"kl": -1.0}, "model.objective.kl", ["positive", "-1.0"]),
    ("model.objective", {}, "model.objective", ["kl"]),
    ("model.draft.aux_layers", [5, 2, 1], "model.draft.aux_layers", ["ascending", "[5, 2, 1]"]),
    ("model.draft.aux_layers", [2, 2, 4], "model.draft.aux_layers", ["ascending", "[2, 2, 4]"]),
    ("model.draft.aux_layers", [2, 4, LAYERS + 1], "model.draft.aux_layers", [f"0..{LAYERS}", "9"]),
    ("model.draft.aux_layers", [-1, 4, 5], "model.draft.aux_layers", [f"0..{LAYERS}", "-1"]),
    ("model.draft.aux_layers", [], "model.draft.aux_layers", ["[]"]),
    (
        "model.draft.draft_vocab_size",
        VOCABULARY + 1,
        "model.draft.draft_vocab_size",
        [str(VOCABULARY + 1), str(VOCABULARY), "null"],
    ),
    ("trainer.accelerator", "cpuu", "trainer", ["cpuu", "cuda"]),
    ("trainer.devices", 0, "trainer", ["devices"]),
    ("trainer.max_time", "1x", "trainer", ["1x"]),
    ("seed_everything", -3, "seed_everything", ["-3"]),
    ("ckpt_path", "/nowhere.ckpt", "ckpt_path", ["/nowhere.ckpt", "last", "best"]),
]
PLAIN = [
    ("model", 3),
    ("model.draft", 3),
    ("model.draft", "llama"),
    ("model.optimizer", "adamw"),
    ("model.schedule", ["cosine"]),
    ("data", "x.jsonl"),
    ("data", ["x.jsonl"]),
    ("trainer", 3),
]


def name(case: Any) -> str:
    """Name a case in the report."""
    return json.dumps(case) if not isinstance(case, str) else case


@pytest.mark.parametrize(("key", "value", "parts"), PARSED, ids=name)
def test_wrong_value_in_a_file(base, refusal, tmp_path, key, value, parts):
    file = write(tmp_path / "run.yaml", with_value(base, key, value))
    message = refusal("--config", str(file))
    for part in [key, f"{file}:{line_of(file, key)}", *parts]:
        assert part in message


@pytest.mark.parametrize(("key", "value", "parts"), PARSED, ids=name)
def test_wrong_value_on_the_command_line(base, refusal, tmp_path, key, value, parts):
    file = write(tmp_path / "run.yaml", base)
    message = refusal("--config", str(file), *flag(key, value))
    for part in [key, *parts]:
        assert part in message
    assert "run.yaml:" not in message


@pytest.mark.parametrize(("key", "value", "named", "parts"), BUILT, ids=name)
@pytest.mark.parametrize("source", ["file", "flag"])
def test_conflicting_values(base, refusal, tmp_path, source, key, value, named, parts):
    if source == "file":
        words = ["--config", str(write(tmp_path / "run.yaml", with_value(base, key, value)))]
    else:
        words = ["--config", str(write(tmp_path / "run.yaml", base)), *flag(key, value)]
    message = refusal(*words)
    for part in [named, *parts]:
        assert part in message


@pytest.mark.parametrize(("key", "value"), PLAIN, ids=name)
@pytest.mark.parametrize("source", ["file", "flag"])
def test_plain_value_where_a_group_belongs(base, refusal, tmp_path, source, key, value):
    if source == "file":
        words = ["--config", str(write(tmp_path / "run.yaml", with_value(base, key, value)))]
    else:
        words = ["--config", str(write(tmp_path / "run.yaml", base)), *flag(key, value)]
    message = refusal(*words)
    assert message.startswith(f"{key}: ")
    assert "expected keys and values" in message
    assert str(value) in message or json.dumps(value) in message


@pytest.mark.parametrize("key", ["model", "model.draft", "model.optimizer", "trainer", "data"])
def test_empty_group(base, refusal, tmp_path, key):
    message = refusal("--config", str(write(tmp_path / "run.yaml", with_value(base, key, None))))
    assert message.startswith(f"{key}: ") or (key == "data" and "data.train" in message)


@pytest.mark.parametrize("key", ["verifier", "data.train"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_required_key(base, refusal, tmp_path, key, how):
    values = with_value(base, key, None)
    if how == "absent":
        group, _, last = key.rpartition(".")
        del (values[group] if group else values)[last]
    message = refusal("--config", str(write(tmp_path / "run.yaml", values)))
    assert key in message and "required" in message


def test_output_dir_cannot_be_null(base, refusal, tmp_path):
    assert "output_dir" in refusal("--config", str(write(tmp_path / "run.yaml", with_value(base, "output_dir", None))))


def test_callback_class_that_does_not_exist(base, refusal, tmp_path):
    callbacks = [{"class_path": "lightning.pytorch.callbacks.EarlyStoppin"}]
    message = refusal("--config", str(write(tmp_path / "run.yaml", with_value(base, "trainer.callbacks", callbacks))))
    assert "trainer.callbacks" in message and "EarlyStoppin" in message
    assert "expected null" not in message


def test_linked_key_given_twice(base, refusal, tmp_path):
    message = refusal("--config", str(write(tmp_path / "run.yaml", with_value(base, "model.verifier", "x"))))
    assert "model.verifier" in message


def test_stray_word(base, refusal, tmp_path):
    assert "stray" in refusal("--config", str(write(tmp_path / "run.yaml", base)), "stray")


def test_the_later_of_two_files_is_named(base, refusal, tmp_path):
    first = write(tmp_path / "first.yaml", base)
    second = write(tmp_path / "second.yaml", {"model": {"draft": {"num_layers": 0}}})
    assert f"{second}:3" in refusal("--config", str(first), "--config", str(second))


class TestFiles:
    def test_missing(self, refusal, tmp_path):
        message = refusal("--config", str(tmp_path / "nowhere.yaml"))
        assert str(tmp_path / "nowhere.yaml") in message and "no such file" in message

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("algorithm: eagle3\nmodel: {draft: [\n", 3),
            ("algorithm: eagle3\nmodel:\n\tttt_steps: 2\n", 3),
            ("algorithm: eagle3\nverifier: x: y\n", 2),
        ],
    )
    def test_yaml_syntax(self, refusal, tmp_path, text, line):
        (tmp_path / "run.yaml").write_text(text)
        message = refusal("--config", str(tmp_path / "run.yaml"))
        assert f"{tmp_path / 'run.yaml'}:{line}" in message and "not valid YAML" in message

    @pytest.mark.parametrize("text", ["", "- algorithm: eagle3\n", "eagle3\n", "3"])
    def test_not_a_mapping(self, refusal, tmp_path, text):
        (tmp_path / "run.yaml").write_text(text)
        message = refusal("--config", str(tmp_path / "run.yaml"))
        assert str(tmp_path / "run.yaml") in message and "keys and values" in message

    def test_not_text(self, refusal, tmp_path):
        (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x01")
        assert str(tmp_path / "run.yaml") in refusal("--config", str(tmp_path / "run.yaml"))

    def test_control_character(self, refusal, tmp_path):
        (tmp_path / "run.yaml").write_text("algorithm: \x01eagle3\n")
        assert str(tmp_path / "run.yaml") in refusal("--config", str(tmp_path / "run.yaml"))

    def test_folder(self, refusal, tmp_path):
        assert str(tmp_path) in refusal("--config", str(tmp_path))

    def test_flag_without_a_file(self, capfd):
        try:
            status = main(["fit", "--config"])
        except SystemExit as left:
            status = left.code
        message = capfd.readouterr().err
        assert status == 2
        assert "--config" in message and "specforge fit" in message


class TestAlgorithm:
    @pytest.mark.parametrize("words", [[], ["--verifier", "x"]])
    def test_none_chosen(self, refusal, words):
        message = refusal(*words)
        assert "no algorithm is chosen" in message and "eagle3" in message and "--config" in message

    @pytest.mark.parametrize("value", [None, ""])
    def test_none_chosen_by_a_file(self, refusal, tmp_path, value):
        file = write(tmp_path / "run.yaml", {"algorithm": value})
        assert "no algorithm is chosen" in refusal("--config", str(file))

    @pytest.mark.parametrize("source", ["file", "flag"])
    def test_unknown(self, refusal, tmp_path, source):
        file = write(tmp_path / "run.yaml", {"algorithm": "eagl3" if source == "file" else "eagle3"})
        words = ["--algorithm", "eagl3"] if source == "flag" else []
        message = refusal("--config", str(file), *words)
        assert "'eagl3'" in message and "Did you mean 'eagle3'?" in message


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_without_a_run(base, refusal, tmp_path, command):
    message = refusal("--config", str(write(tmp_path / "run.yaml", base)), command=command)
    assert "'best'" in message and str(tmp_path / "runs") in message and "--ckpt_path" in message
