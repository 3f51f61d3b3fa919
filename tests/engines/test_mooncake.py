"""States through a real Mooncake store, over TCP: what comes, that nothing is left, and what is refused."""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("mooncake") is None or importlib.util.find_spec("hs_connectors") is None:
    pytest.skip("needs the extra mooncake", allow_module_level=True)
if ctypes.util.find_library("ibverbs") is None:
    pytest.skip("Mooncake needs the package libibverbs1", allow_module_level=True)

import torch
from extracting_server import ExtractingServer
from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8
from mooncake_server import MooncakeServer, mooncake_master
from transformers import AutoTokenizer

from specforge.__main__ import main
from specforge.data.features.mooncake import MooncakeTransport
from specforge.data.features.store import FeatureStore
from specforge.errors import SpecforgeError

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
VERIFIER = CONFIG.parent / "quickstart" / "verifier"
LAYERS = [2, 4, 5, 8]
ROWS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[None]:
    """A store that the environment names, as a user would."""
    with mooncake_master(tmp_path_factory.mktemp("master")) as address, pytest.MonkeyPatch.context() as environment:
        environment.setenv("MOONCAKE_MASTER", address)
        environment.setenv("MOONCAKE_LOCAL_HOSTNAME", "127.0.0.1")
        environment.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "64mb")
        environment.setenv("MOONCAKE_LOCAL_BUFFER_SIZE", "16mb")
        yield


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr("specforge.engines.pool.REST_SECONDS", 0.05)
    monkeypatch.setattr("specforge.data.features.mooncake.WRITTEN_SECONDS", 1.0)


@pytest.fixture(scope="module")
def started(model, store) -> Iterator[MooncakeServer]:
    """A server with the settings of the printed line."""
    settings = MooncakeTransport().connector(None)["kv_connector_extra_config"]["mooncake"]
    server = MooncakeServer(model, LAYERS, settings, AutoTokenizer.from_pretrained(VERIFIER))
    yield server
    server.store._store.close()


@pytest.fixture
def server(started) -> Iterator[MooncakeServer]:
    never: dict[str, Any] = {"fault": lambda _: None, "lost": lambda _: False, "written": lambda _, tensors: tensors}
    vars(started).update(never, rows=[], names=[], requests=0, delay=0.0)
    with started:
        yield started


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Flags of ``fit``: some rows of the quickstart."""
    folder = tmp_path_factory.mktemp("rows")
    with (CONFIG.parent / "quickstart" / "train.jsonl").open() as file:
        (folder / "rows.jsonl").write_text("".join(next(file) for _ in range(ROWS)))
    names = {"config": CONFIG, "verifier": VERIFIER, "data.train": folder / "rows.jsonl", "data.cache_dir": folder}
    return [f"--{name}={value}" for name, value in names.items()] + ["--data.validation=null"]


def prepare(words: list[str], url: str, output: Path, transport: str = "mooncake") -> list[str]:
    flags = {"output": output, "endpoint": url, "transport": transport, "dtype": "float32", "concurrency": 4}
    return ["prepare", "features", *words, *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module")
def undisturbed(model, words, tmp_path_factory) -> FeatureStore:
    """The states of the rows by the transport of files."""
    folder = tmp_path_factory.mktemp("files")
    with ExtractingServer(model, LAYERS, folder) as files:
        assert main(prepare(words, files.url, folder / "store", "file")) == 0
    return FeatureStore(folder / "store")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestStates:
    def test_they_are_those_of_files_and_nothing_is_left_after_faults(self, server, words, undisturbed, tmp_path):
        wrong = cycle([lambda one: None, lambda one: {**one, "token_ids": one["token_ids"].flip(0)}])
        server.written = lambda number, tensors: next(wrong)(tensors) if number % 5 == 0 else tensors
        server.lost = lambda number: number % 7 == 0
        server.fault = lambda number: 503 if number % 11 == 0 else None
        server.delay = 0.02
        assert main(prepare(words, server.url, tmp_path / "store")) == 0
        assert contents(tmp_path / "store") == contents(undisturbed.folder)
        assert len(server.names) > ROWS and not server.left()

    def test_a_killed_client_asks_for_nothing_twice_that_was_answered(self, server, words, undisturbed, tmp_path):
        line = prepare(words, server.url, tmp_path / "store")
        server.fault = lambda number: time.sleep(60) or 503 if number == 10 else None
        child = subprocess.Popen([sys.executable, "-m", "specforge", *line], stderr=subprocess.DEVNULL)
        while len(server.rows) < 12 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert server.left(), "the shard is not written"
        server.fault = lambda number: None
        assert main(line) == 0
        assert contents(tmp_path / "store") == contents(undisturbed.folder)
        # A request whose answer was on its way may be repeated.
        assert ROWS <= len(server.rows) <= ROWS + 4 and not server.left()

    def test_processes_that_load_batches_receive_them(self, server, words, undisturbed, tmp_path, capfd):
        run = [*words, "--trainer.accelerator=cpu", "--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
        losses = {}
        for name, flags in {
            "stored": [f"--data.features={undisturbed.folder}"],
            "served": [
                *("--data.features=server", f"--data.feature_servers=[{server.url}]", "--data.num_workers=2"),
                *("--data.feature_transport=mooncake", "--data.record", str(tmp_path / "record")),
            ],
        }.items():
            assert main(["fit", *run, *flags, f"--output_dir={tmp_path / name}"]) == 0, capfd.readouterr().err
            losses[name] = metrics(tmp_path / name)
        assert losses["served"] == pytest.approx(losses["stored"], rel=1e-2) and len(losses["served"]) == 3
        assert len(server.names) > 3 and not server.left()

    def test_answers_come_with_their_states(self, server, words, tmp_path):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"turns": [f"What is {n} + {n}?"]}) + "\n" for n in range(4)))
        config = tmp_path / "fit.yaml"
        text = CONFIG.read_text().replace("configs/quickstart/verifier", str(VERIFIER))
        config.write_text(text.replace("data:\n", "data:\n  feature_transport: mooncake\n"))
        server.lost = lambda number: number == 3
        line = ["prepare", "responses", str(prompts), "--output", str(tmp_path / "out"), "--record", str(config)]
        assert main([*line, "--endpoint", server.url, "--max_new_tokens", "6", "--check", "0"]) == 0
        assert len(FeatureStore(tmp_path / "out" / "features").kept) == 4
        assert len(server.names) == 6, "the probe, each answer, and the lost one again"
        assert not server.left()

    def test_doctor_compares_them_with_our_own(self, server, capfd):
        line = ["--endpoint", server.url, "--config", str(CONFIG), "--verifier", str(VERIFIER), "--compare"]
        assert main(["doctor", *line, "--data.feature_transport", "mooncake"]) == 0
        out, err = capfd.readouterr()
        assert "within 0.00% of our own capture" in " ".join(out.split())
        assert "Local segment descriptor not found" not in err, "Mooncake's error that is none"
        assert len(server.names) == 2 and not server.left()

    def test_files_of_one_byte_per_value_are_read(self, model, words, undisturbed, tmp_path):
        def quantised(number: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values, scales = quantize_tensor_to_fp8(tensors["hidden_states"])
            return {**tensors, "hidden_states": values, SCALES_KEY: scales}

        (tmp_path / "states").mkdir()
        with ExtractingServer(model, LAYERS, tmp_path / "states") as files:
            files.written = quantised
            assert main(prepare(words, files.url, tmp_path / "store", "fp8")) == 0
        store = FeatureStore(tmp_path / "store")
        assert (store.kept == undisturbed.kept).all()
        for layer in store.manifest.layers:
            found, expected = (
                torch.cat([one.read(row, layer)[0] for row in range(ROWS)]) for one in (store, undisturbed)
            )
            assert not torch.equal(found, expected)
            assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).median() < 1 / 15


def metrics(folder: Path) -> list[float]:
    from training_runs import scalars

    (run,) = folder.rglob("checkpoints")
    return [value for _, value in scalars(run.parent, "train/loss")]


class TestTheLine:
    def test_it_has_the_connector_and_mooncakes_settings(self, store, capsys):
        line = ["serve-verifier", "--config", str(CONFIG), "--verifier", str(VERIFIER), "--print"]
        assert main([*line, "--data.feature_transport", "mooncake"]) == 0
        words = shlex.split(capsys.readouterr().out)
        connector = json.loads(words[words.index("--kv-transfer-config") + 1])
        assert connector["kv_connector"] == "MooncakeHiddenStatesConnector"
        assert importlib.util.find_spec(connector["kv_connector_module_path"]) is not None
        settings = connector["kv_connector_extra_config"]["mooncake"]
        assert settings["master_server_address"] == os.environ["MOONCAKE_MASTER"] and settings["protocol"] == "tcp"
        assert settings["global_segment_size"] == 64 * 2**20
        assert main([*line, "--transport", "mooncake", "--folder", "/mnt"]) == 2


class TestFaults:
    def check(self, url: str, capsys: Any) -> str:
        """Return what doctor says, on one line."""
        assert main(["doctor", "--endpoint", url, "--transport", "mooncake"]) in (1, 2)
        return " ".join("".join(capsys.readouterr()).split())

    def test_states_that_do_not_come(self, server, capsys, monkeypatch):
        answer = server.answer
        monkeypatch.setattr(server, "written", lambda number, tensors: time.sleep(3) or tensors)
        assert "into Mooncake's store within 1 seconds, or it was evicted" in self.check(server.url, capsys)
        monkeypatch.setattr(server, "written", lambda number, tensors: None)
        assert "producer error" in self.check(server.url, capsys)
        monkeypatch.setattr(server, "answer", lambda body: (200, {"choices": [1], "kv_transfer_params": {"a": 1}}))
        assert "names no object of Mooncake (kv_transfer_params: ['a'])" in self.check(server.url, capsys)
        for change in ({"version": 2}, {"tensors": None}, {"metadata": 3}, {"tensors": {"hidden_states": {}}}):

            def changed(body: Any, change: dict[str, Any] = change) -> Any:
                status, found = answer(body)
                return status, {**found, "kv_transfer_params": {**found["kv_transfer_params"], **change}}

            monkeypatch.setattr(server, "written", lambda number, tensors: tensors)
            monkeypatch.setattr(server, "answer", changed)
            assert "FAULT" in self.check(server.url, capsys), change

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({}, "set MOONCAKE_MASTER=HOST:PORT"),
            ({"MOONCAKE_CONFIG_PATH": "/nowhere.json"}, "No such file"),
            ({"MOONCAKE_MASTER": "host:1", "MOONCAKE_GLOBAL_SEGMENT_SIZE": "much"}, "Mooncake is not configured"),
            ({"MOONCAKE_MASTER": "127.0.0.1:1"}, "no connection to Mooncake's master at 127.0.0.1:1 over tcp"),
        ],
    )
    def test_a_wrong_configuration(self, server, capsys, monkeypatch, variables, message):
        monkeypatch.delenv("MOONCAKE_MASTER")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert message in self.check(server.url, capsys)

    def test_libraries_that_are_missing(self, store, monkeypatch):
        monkeypatch.setitem(sys.modules, "mooncake.store", None)
        with pytest.raises(SpecforgeError, match="apt-get install libibverbs1"):
            MooncakeTransport().sweep("specforge-x")

    def test_a_master_that_ends(self, server, capsys, monkeypatch, tmp_path):
        with mooncake_master(tmp_path) as address:
            monkeypatch.setenv("MOONCAKE_MASTER", address)
            transport = MooncakeTransport()
            transport.sweep("specforge-x")
        with pytest.raises(SpecforgeError, match=r"is mooncake_master still running at 127\.0\.0\.1"):
            transport.sweep("specforge-x")
