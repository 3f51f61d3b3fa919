"""Training on states that serving engines are asked for, on loopback: losses, resumption, recording, dead servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extracting_server import ExtractingServer
from quickstart_runs import VERIFIER
from run_processes import QUIET, begin_torchrun
from training_runs import assert_same_weights, scalars, weights

from specforge.__main__ import main
from specforge.training import teacher
from specforge.verifier.loading import load_verifier

LAYERS = [2, 4, 5, 8]
STEPS = "--trainer.max_steps=6"
WORDS = [STEPS, "--trainer.val_check_interval=3"]
Serve = Callable[..., list[ExtractingServer]]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_verifier(str(VERIFIER))


@pytest.fixture
def serve(model, tmp_path) -> Iterator[Serve]:
    """Start servers with one shared folder."""
    started: list[ExtractingServer] = []
    folder = tmp_path / "states"
    folder.mkdir()

    def start(number: int) -> list[ExtractingServer]:
        started.extend(ExtractingServer(model, LAYERS, folder) for _ in range(number))
        for one in started[-number:]:
            one.start()
        return started[-number:]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr("specforge.engines.pool.REST_SECONDS", 0.05)
    monkeypatch.setattr("specforge.data.features.servers.RETRIES", 0)


@pytest.fixture
def no_verifier(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(teacher, "load_verifier", lambda *_: pytest.fail("the verifier was loaded"))


def asked(servers: list[ExtractingServer], *more: str) -> list[str]:
    urls = json.dumps([one.url for one in servers])
    return ["--data.features=server", f"--data.feature_servers={urls}", "--data.num_workers=2", *more]


def losses(run: Path, tag: str = "train/loss") -> list[float]:
    return [value for _, value in scalars(run, tag)]


def last(run: Path) -> dict[str, torch.Tensor]:
    return weights(run / "checkpoints" / "last.ckpt")


def test_the_losses_are_those_of_a_live_verifier_and_nothing_is_left(fit, serve, no_verifier):
    live = fit("live", *WORDS)
    no_verifier()
    servers = serve(2)
    servers[0].lost = lambda number: number % 8 == 5
    served = fit("served", *WORDS, *asked(servers))
    for tag, number in (("train/loss", 6), ("val/loss", 2)):
        assert len(losses(served, tag)) == number
        assert losses(served, tag) == pytest.approx(losses(live, tag), rel=1e-2)
    assert all(len(one.rows) > 5 for one in servers), "the servers share the rows"
    assert not any(servers[0].folder.iterdir())
    assert len(losses(served, "train/idle_share")) == 6


def test_recorded_states_give_the_same_losses_and_are_not_asked_again(workshop, fit, serve, no_verifier, tmp_path):
    (server,), store = serve(1), tmp_path / "store"
    no_verifier()
    words = ["--trainer.max_epochs=2", "--trainer.max_steps=-1", "--data.batch_size=8"]
    plain = fit("plain", *words, *asked([server]))
    server.rows.clear()
    recorded = fit("recorded", *words, *asked([server], f"--data.record={store}"))
    assert len(server.rows) == 1 + 48, "each row once, after the check at the start"
    server.kill()
    stored = fit("stored", *words, f"--data.features={store}")
    for run in (recorded, stored):
        for tag in ("train/loss", "val/loss"):
            assert losses(run, tag) == losses(plain, tag)


class TestServersThatEnd:
    @pytest.fixture(scope="class")
    def undisturbed(self, model, shared, tmp_path_factory) -> Path:
        """A run with one server."""
        with ExtractingServer(model, LAYERS, tmp_path_factory.mktemp("states")) as server:
            assert main(["fit", *shared.words("undisturbed", *WORDS, *asked([server]))]) == 0
        return shared.run_folder("undisturbed")

    def test_two_ranks_train_on_when_one_of_two_servers_ends(self, shared, serve, tmp_path, undisturbed):
        first, second = serve(2)
        second.fault = lambda number: second.kill() or 0 if number == 12 else None
        words = [*WORDS, QUIET, "--data.batch_size=1", *asked([first, second])]
        process = begin_torchrun(["fit", *shared.words("ranks", *words)], tmp_path, 2)
        status, shown = process.wait(), "".join(path.read_text() for path in tmp_path.glob("rank*.log"))
        assert status == 0, shown
        assert second._server is None and f"{second.url} is dropped" in shown
        assert not any(first.folder.glob("*.safetensors"))
        # An optimizer step has the same rows; only the order of summation differs.
        expected, found = last(undisturbed), last(shared.run_folder("ranks"))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)

    def test_without_any_a_run_stops_with_one_message_and_resumes(self, shared, serve, undisturbed, monkeypatch, capfd):
        monkeypatch.setattr("specforge.data.features.servers.PATIENCE", 0.3)
        servers = serve(2)
        servers[0].fault = lambda number: servers[0].kill() or 0 if number == 12 else None
        servers[1].fault = lambda number: servers[1].kill() or 0 if number == 12 else None
        words = ["fit", *shared.words("resumed", *WORDS, "--save_every_n_steps=1", *asked(servers))]
        assert main(words) == 1
        shown = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert len(shown) == 1 and "no connection" in shown[0]
        assert shown[0].endswith("start the servers again, and resume the run with --ckpt_path last")
        for one in servers:
            one.fault = lambda number: None
            one.start()
        assert main([*words, "--ckpt_path=last"]) == 0
        assert_same_weights(last(undisturbed), last(shared.run_folder("resumed")))


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--data.features=server"], "data.feature_servers: is required with data.features: server"),
            (["--data.features=server", "--data.feature_servers=[host]"], "'host' is not the URL of a server"),
            (["--data.features=server", "--data.feature_servers=[http://a:b@c/v1]"], "configurations are stored"),
            (["--data.features=server", "--data.feature_servers=3"], "data.feature_servers"),
            (["--data.features=live", "--data.record=store"], "data.record: only states of data.features: server"),
            (["--data.features=sever"], "allowed: live, record, server, or a folder"),
            (
                ["--data.features=server", "--data.feature_servers=[http://c/v1]", "--data.feature_transport=fiel"],
                "Did you mean 'file'?",
            ),
        ],
    )
    def test_settings_that_do_not_fit_are_one_message(self, shared, capfd, words, message):
        assert main(["fit", *shared.words("refused", *words)]) == 2
        shown = capfd.readouterr().err
        assert message in shown and "Traceback" not in shown

    def test_an_estimate_needs_no_server(self, shared, capfd):
        words = [*shared.words("estimated"), "--data.features=server", "--data.feature_servers=[http://c/v1]"]
        assert main(["estimate", *words, "--device_flops=1e12", "--model.ttt_steps=1"]) == 0
        assert "Traceback" not in capfd.readouterr().err

    def test_a_server_that_is_not_right_is_found_before_training(self, workshop, fit, serve, capfd, tmp_path):
        (server,) = serve(1)
        server.layers = [2, 4, 8]
        fit("layers", STEPS, *asked([server]), status=1)
        assert "eagle_aux_hidden_state_layer_ids [2, 4, 5, 8]" in capfd.readouterr().err
        server.kill()
        fit("dead", STEPS, *asked([server]), status=1)
        assert "no connection" in capfd.readouterr().err
        server.start()
        server.layers = LAYERS
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "thesis.tex").write_text("all of it")
        fit("folder", STEPS, *asked([server], f"--data.record={tmp_path / 'store'}"), status=2)
        assert "holds something else (thesis.tex)" in capfd.readouterr().err
