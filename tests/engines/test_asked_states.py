"""Features asked of servers: what is stored, and that faults of servers and clients lose nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from child_processes import in_child, status_of
from extracting_server import ExtractingServer

from specforge.__main__ import main
from specforge.data.features.asking import AskedStates
from specforge.data.features.dtypes import decode
from specforge.data.features.manifest import FeatureNeeds, Manifest
from specforge.data.features.plan import ShardPlan
from specforge.data.features.preparing import prepare_features
from specforge.data.features.served import engine_layer_ids
from specforge.data.features.servers import StateServers
from specforge.data.features.store import FeatureStore
from specforge.data.features.transports import FileTransport
from specforge.data.rows.building import build_rows
from specforge.data.rows.summary import RowSettings
from specforge.engines.pool import EndpointSettings
from specforge.errors import SpecforgeError, UsageError
from specforge.files import locked
from specforge.verifier.features import capture

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
ROWS = 40
NEEDS = FeatureNeeds(str(VERIFIER), "0123456789abcdef", (0, 1, 4, 7), 8, 64, whole_rows=False)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    with (QUICKSTART / "train.jsonl").open() as file:
        return [next(file) for _ in range(ROWS)]


@pytest.fixture(scope="module")
def plan(lines, tmp_path_factory) -> ShardPlan:
    """40 rows in about 10 shards."""
    folder = tmp_path_factory.mktemp("rows")
    tokens = [{key: json.loads(line)[key] for key in ("input_ids", "loss_mask")} for line in lines]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in tokens))

    def no_tokenizer() -> Any:
        raise AssertionError("token rows need no tokenizer")

    rows = build_rows(str(folder / "rows.jsonl"), no_tokenizer, 1280, RowSettings(512, "truncate"), folder / "cache")
    return ShardPlan([rows], NEEDS, token_bytes=5 * 64 * 4, shard_bytes=4 * 60 * 5 * 64 * 4)


@pytest.fixture
def manifest(plan) -> Manifest:
    return Manifest("v", NEEDS.fingerprint, None, 1280, NEEDS.layers, 64, "float32", False, plan.identity)


@pytest.fixture
def serve(model, tmp_path) -> Iterator[Callable[..., ExtractingServer]]:
    """Start servers that write into folders in memory or on disk."""
    started: list[ExtractingServer] = []

    def start(layers: list[int] = NEEDS.layers) -> ExtractingServer:
        folder = tmp_path / f"shared{len(started)}"
        folder.mkdir()
        started.append(ExtractingServer(model, engine_layer_ids(layers), folder))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr("specforge.engines.pool.REST_SECONDS", 0.05)
    monkeypatch.setattr("specforge.data.features.transports.VISIBLE_SECONDS", 0.1)


@pytest.fixture
def ask(plan, manifest, tmp_path) -> Callable[..., FeatureStore | None]:
    def ask_all(name: str, *servers: ExtractingServer, dtype: str = "float32", **settings: Any) -> FeatureStore | None:
        output, kind = tmp_path / name, replace(manifest, dtype=dtype)
        how = {"retries": 0, "timeout": 5.0, "concurrency": 8, "patience": 0.3, "max_failures": 3, **settings}
        chosen = EndpointSettings([one.url for one in servers], **how)
        with AskedStates(chosen, FileTransport(), kind, output) as states:
            found = prepare_features(plan, kind, output, states, chosen.concurrency, states.forget)
        return None if found is None else FeatureStore(output)

    return ask_all


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(plan, model, tmp_path_factory) -> dict[str, bytes]:
    """The store of a run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    kind = Manifest("v", NEEDS.fingerprint, None, 1280, NEEDS.layers, 64, "float32", False, plan.identity)
    (folder / "shared").mkdir()
    with ExtractingServer(model, NEEDS.layers, folder / "shared") as server:
        settings = EndpointSettings([server.url])
        with AskedStates(settings, FileTransport(), kind, folder / "store") as states:
            prepare_features(plan, kind, folder / "store", states, 64, states.forget)
    return files(folder / "store")


class TestStates:
    @pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float8_e4m3fn", 1 / 15)])
    def test_they_are_those_of_our_own_capture_at_every_layer(self, plan, model, serve, ask, dtype, bound):
        server = serve()
        store = ask("store", server, dtype=dtype)
        rows = plan.sources[0]
        for number, index in enumerate(store.locate(rows.digests)):
            kept = int(plan.kept[number])
            ids = rows[number]["input_ids"][None, :kept]
            own = capture(model, ids, torch.arange(kept)[None], NEEDS.aux_layers)
            expected = [*own.aux[0].unbind(1), own.last[0]]
            for layer, states in zip(NEEDS.layers, expected, strict=True):
                found = decode(*store.read(index, layer), torch.float32)
                assert ((found - states).abs() <= states.abs().amax(-1, keepdim=True) * bound).all(), layer
        assert len(server.rows) == ROWS and not any(server.folder.iterdir())
        assert not any(path.name.startswith(".") for path in store.folder.iterdir())

    def test_rows_of_several_shards_are_in_flight(self, plan, serve, ask):
        server, many, came = serve(), Event(), []
        server.fault = lambda number: many.set() if number == 16 else None
        server.written = lambda number, tensors: came.append(many.wait(5.0)) or tensors
        ask("store", server, concurrency=20)
        assert all(came), "the first states are written when there are 16 requests"
        assert max(map(len, plan.shards)) < 12 and server.most_at_once <= 20

    def test_the_command_stores_what_it_captures_itself(self, serve, lines, tmp_path, capsys):
        (tmp_path / "rows.jsonl").write_text("".join(lines[:12]))
        words = [str(tmp_path / "rows.jsonl"), "--config", str(QUICKSTART.parent / "quickstart.yaml")]
        words += [f"--data.cache_dir={tmp_path / 'cache'}", f"--verifier={VERIFIER}", "--dtype", "float32"]
        server = serve([2, 4, 5, 8])
        asked = ["--endpoint", server.url, "--concurrency", "4"]
        assert main(["prepare", "features", *words, "--output", str(tmp_path / "own")]) == 0
        assert main(["prepare", "features", *words, "--output", str(tmp_path / "asked"), *asked]) == 0
        assert "specforge fit --config" in capsys.readouterr().out.splitlines()[-1]
        own, found = FeatureStore(tmp_path / "own"), FeatureStore(tmp_path / "asked")
        assert found.manifest.rows_identity == own.manifest.rows_identity and len(server.rows) == 12
        for index in range(12):
            for layer in (2, 4, 5, 8):
                torch.testing.assert_close(found.read(index, layer)[0], own.read(index, layer)[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("words", [["--model", "served"], ["--transport", "file"]])
    def test_what_is_said_of_servers_needs_one(self, words, tmp_path, capsys):
        """Without it, the verifier would run here."""
        assert main(["prepare", "features", "--config", "x", "--output", str(tmp_path / "out"), *words]) == 2
        assert f"{words[0]}: needs --endpoint URL" in capsys.readouterr().err

    def test_the_shards_of_another_process_are_left_to_it(self, serve, lines, tmp_path, capsys):
        (tmp_path / "rows.jsonl").write_text("".join(lines[:12]))
        words = [str(tmp_path / "rows.jsonl"), "--config", str(QUICKSTART.parent / "quickstart.yaml")]
        words += [f"--data.cache_dir={tmp_path / 'cache'}", f"--verifier={VERIFIER}", "--output", str(tmp_path / "out")]
        words += ["--endpoint", serve([2, 4, 5, 8]).url]
        (tmp_path / "out").mkdir()
        with locked(tmp_path / "out" / "shard-00000.safetensors"):
            assert main(["prepare", "features", *words]) == 0
        assert "If none is running any longer, run the same command again" in capsys.readouterr().out
        assert not list((tmp_path / "out").glob("*.json"))
        assert main(["prepare", "features", *words]) == 0
        assert len(FeatureStore(tmp_path / "out").kept) == 12


def cut(tensors: Any) -> Any:
    return {**tensors, "hidden_states": tensors["hidden_states"][2:].contiguous()}


CHANGES: dict[str, Callable[[Any], Any]] = {
    "short": cut,
    "other ids": lambda one: {**one, "token_ids": one["token_ids"].flip(0)},
    "not finite": lambda one: {**one, "hidden_states": one["hidden_states"] / 0},
    "one layer": lambda one: {**one, "hidden_states": one["hidden_states"][:, :1].contiguous()},
    "nothing": lambda one: None,
    "something else": lambda one: {"token_ids": one["token_ids"]},
}


class TestFaults:
    def test_failed_requests_are_repeated(self, serve, ask, undisturbed, tmp_path):
        server, faults = serve(), cycle([503, 429, 0, 500])
        server.fault = lambda number: next(faults) if number % 4 == 0 else None
        ask("store", server, concurrency=3)
        assert files(tmp_path / "store") == undisturbed
        assert len(server.rows) == ROWS and not any(server.folder.iterdir())

    def test_wrong_states_are_deleted_and_asked_again(self, serve, ask, undisturbed, tmp_path):
        server, changes = serve(), cycle(CHANGES.values())
        server.written = lambda number, tensors: next(changes)(tensors) if number % 5 == 0 else tensors
        ask("store", server, concurrency=3)
        assert files(tmp_path / "store") == undisturbed
        assert not any(server.folder.iterdir())

    def test_lost_answers_leave_no_file(self, serve, ask, undisturbed, tmp_path):
        server = serve()
        server.lost = lambda number: number % 4 == 0
        stranger = server.folder / "cmpl-another-client-0.safetensors"
        stranger.write_bytes(b"")
        ask("store", server, concurrency=3)
        assert files(tmp_path / "store") == undisturbed and len(server.rows) > ROWS
        assert list(server.folder.iterdir()) == [stranger]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("short", "states of .* of the .* tokens of the row: with prefix caching.*--no-enable-prefix-caching"),
            ("other ids", "are of other tokens"),
            ("not finite", "not all finite numbers; serve the verifier in a wider type"),
            ("one layer", r"eagle_aux_hidden_state_layer_ids \[0, 1, 4, 7, 8\]"),
            ("nothing", "has ended without writing"),
            ("something else", "holds no states"),
        ],
    )
    def test_a_server_that_gives_only_wrong_states_is_explained(self, serve, ask, name, message, tmp_path):
        server = serve()
        server.written = lambda number, tensors: CHANGES[name](tensors)
        with pytest.raises(SpecforgeError, match=message) as error:
            ask("store", server)
        assert error.value.exit_status == 1 and "\n" not in str(error.value)
        assert not list((tmp_path / "store").glob("shard-*"))

    def test_a_folder_that_is_not_shared_is_explained(self, serve, ask, tmp_path):
        server = serve()
        states = server.answer

        def elsewhere(body: Any) -> Any:
            return 200, {**states(body)[1], "kv_transfer_params": {"hidden_states_path": "/nowhere/x.safetensors"}}

        server.answer = elsewhere
        with pytest.raises(SpecforgeError, match=r"/nowhere/x.safetensors is not on this machine; mount the server's"):
            ask("store", server)

    def test_a_server_without_the_connector_is_explained(self, serve, ask):
        server = serve()
        server.extracts = False
        with pytest.raises(SpecforgeError, match=r"does not extract states; start it with .*serve-verifier"):
            ask("store", server)

    def test_a_row_that_is_too_long_for_the_server_is_named(self, serve, ask):
        server = serve()
        server.max_tokens = 20
        with pytest.raises(SpecforgeError, match=r"refuses the row of .* tokens .*maximum context length is 20"):
            ask("store", server)

    def test_no_server_is_one_message(self, serve, ask):
        server = serve()
        server.kill()
        with pytest.raises(SpecforgeError, match="no connection"):
            ask("store", server)
        with pytest.raises(SpecforgeError, match=r"requests in a row have failed.*finished rows are kept"):
            ask("store", server, model="verifier")

    def test_a_slow_server_is_waited_for_and_a_stuck_one_is_not(self, serve, ask, undisturbed, tmp_path, monkeypatch):
        slow = serve()
        slow.delay = 0.1
        ask("store", slow, concurrency=64)
        assert files(tmp_path / "store") == undisturbed
        slow.delay = 3.0
        monkeypatch.setattr("specforge.data.features.row_asker.TRIES", 1)
        with pytest.raises(SpecforgeError, match="were not written within 1 seconds"):
            ask("other", slow, timeout=1.0, concurrency=1)


class TestServersThatEnd:
    def test_the_others_take_over(self, serve, ask, undisturbed, tmp_path, caplog):
        first, second = serve(), serve()
        first.delay = second.delay = 0.02
        second.fault = lambda number: second.kill() or 0 if number == 12 else None
        ask("store", first, second)
        assert files(tmp_path / "store") == undisturbed
        assert f"{second.url} is dropped" in caplog.text and len(first.rows) + len(second.rows) <= ROWS + 8

    def test_one_that_comes_back_is_used_again(self, serve, ask, undisturbed, tmp_path, caplog):
        server = serve()
        server.fault = lambda number: server.kill() or 0 if number == 12 else None

        def restart() -> None:
            while server.requests < 12 or server._server is not None:
                time.sleep(0.01)
            time.sleep(0.2)
            server.start()

        thread = Thread(target=restart)
        thread.start()
        ask("store", server, patience=30.0)
        thread.join()
        assert files(tmp_path / "store") == undisturbed
        assert "is dropped: 3 requests in a row" in caplog.text and "is back" in caplog.text
        assert len(server.rows) <= ROWS + 8


class TestStateServers:
    """Servers that the processes of a training run ask."""

    def test_each_process_opens_its_own_connections(self, plan, serve):
        servers = StateServers([serve().url, serve().url], "file", NEEDS)
        tokens = plan.tokens(range(3))
        servers.check(tokens[0])
        expected = servers.states(tokens)
        assert [len(one) for one in expected] == [len(one) for one in tokens]

        def compare(asked: StateServers) -> None:
            assert all(map(torch.equal, asked.states(tokens), expected))

        assert status_of(in_child(lambda: compare(servers))) == 0, "forked"
        compare(pickle.loads(pickle.dumps(servers)))

    def test_they_serve_one_model_or_the_verifier_by_its_name(self, plan, serve):
        first, second = serve(), serve()
        servers = StateServers([first.url, second.url], "file", NEEDS)
        second.name = "another"
        with pytest.raises(UsageError, match=r"feature_servers: all servers must .* serve another, verifier"):
            servers.check(plan.tokens(range(1))[0])


class TestClients:
    def test_one_that_is_killed_repeatedly_asks_for_nothing_twice_that_was_answered(
        self, serve, ask, undisturbed, tmp_path
    ):
        server, generator, kills = serve(), random.Random(0), 6
        server.delay = 0.01
        for _ in range(kills):
            before = len(server.rows)
            child = in_child(lambda: ask("store", server, concurrency=4, model="verifier"))
            while len(server.rows) < before + generator.randint(1, 10):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended by itself"
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        ask("store", server)
        assert files(tmp_path / "store") == undisturbed
        assert len(server.rows) <= ROWS + kills * 4, "what was in flight"
        assert not any(server.folder.iterdir()), "also of answers that nobody received"

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_one_that_is_killed_around_the_end_of_a_shard_leaves_no_file(
        self, serve, ask, undisturbed, tmp_path, monkeypatch, moment
    ):
        server, forget = serve(), AskedStates.forget

        def end(*arguments: Any) -> None:
            if moment == "after":
                forget(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(AskedStates, "forget", end)
            os.waitpid(in_child(lambda: ask("store", server, concurrency=1)), 0)
        assert (tmp_path / "store" / "shard-00000.safetensors").exists()
        ask("store", server)
        assert files(tmp_path / "store") == undisturbed
        assert len(server.rows) <= ROWS + 1 and not any(server.folder.iterdir())

    def test_answers_of_an_earlier_run_that_are_gone_are_asked_again(self, serve, ask, undisturbed, tmp_path):
        server = serve()
        server.fault = lambda number: 400 if number > 10 else None
        with pytest.raises(SpecforgeError, match="fault 400"):
            ask("store", server)
        assert list((tmp_path / "store").glob(".rows-*.asked"))
        shutil.rmtree(server.folder)
        server.folder.mkdir()
        server.fault = lambda number: None
        ask("store", server, concurrency=64)
        assert files(tmp_path / "store") == undisturbed and not any(server.folder.iterdir())

    def test_several_share_the_rows(self, serve, ask, undisturbed, tmp_path):
        server = serve()
        server.delay = 0.02
        children = [in_child(lambda: ask("store", server, concurrency=2)) for _ in range(3)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        assert files(tmp_path / "store") == undisturbed
        assert len(server.rows) == ROWS and not any(server.folder.iterdir())
