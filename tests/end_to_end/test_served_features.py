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
from specforge.data.features.store import FeatureStore
from specforge.training import teacher
from specforge.verifier.loading import load_verifier

LAYERS = [2, 4, 5, 8]
STEPS = "--trainer.max_steps=10"
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


def test_the_losses_are_those_of_a_live_verifier_and_nothing_is_left(workshop, fit, serve, no_verifier):
    live = fit("live", STEPS, "--trainer.val_check_interval=5")
    no_verifier()
    servers = serve(2)
    served = fit("served", STEPS, "--trainer.val_check_interval=5", *asked(servers))
    for tag, number in (("train/loss", 10), ("val/loss", 1)):
        assert len(losses(served, tag)) == number
        assert losses(served, tag) == pytest.approx(losses(live, tag), rel=1e-2)
    assert all(len(one.rows) > 10 for one in servers), "the servers share the rows"
    assert not any(servers[0].folder.iterdir())
    assert len(losses(served, "train/idle_share")) == 10


def test_recorded_states_give_the_same_losses_and_are_not_asked_again(workshop, fit, serve, no_verifier, tmp_path):
    (server,), store = serve(1), tmp_path / "store"
    no_verifier()
    words = ["--trainer.max_epochs=2", "--trainer.max_steps=-1"]
    plain = fit("plain", *words, *asked([server]))
    before = of_plain = len(server.rows)
    recorded = fit("recorded", *words, *asked([server], f"--data.record={store}"))
    assert len(server.rows) - before == 1 + 48, "each row once, after the check at the start"
    before = len(server.rows)
    again = fit("again", *words, *asked([server], f"--data.record={store}"))
    assert len(server.rows) - before == 1 and of_plain == 1 + 2 * 48
    stored = fit("stored", *words, f"--data.features={store}")
    for run in (recorded, again, stored):
        assert losses(run) == losses(plain) and losses(run, "val/loss") == losses(plain, "val/loss")
    FeatureStore(store).check()


class TestServersThatEnd:
    def test_two_ranks_train_on_when_one_of_two_servers_ends(self, workshop, serve, tmp_path):
        undisturbed, (first, second) = serve(1), serve(2)
        second.fault = lambda number: second.kill() or 0 if number == 12 else None
        for name, servers in (("undisturbed", undisturbed), ("disturbed", [first, second])):
            words = [
                "fit",
                *workshop.words(name, "--trainer.max_steps=5", QUIET, "--data.batch_size=1", *asked(servers)),
            ]
            process = begin_torchrun(words, tmp_path, 2)
            assert process.wait() == 0, (tmp_path / "rank0.log").read_text()
        assert (
            second._server is None
            and f"{second.url} is dropped"
            in (tmp_path / "rank0.log").read_text() + (tmp_path / "rank1.log").read_text()
        )
        assert_same_weights(*(last(workshop.run_folder(name)) for name in ("undisturbed", "disturbed")))
        assert not any(first.folder.glob("*.safetensors"))

    def test_without_any_a_run_stops_with_one_message_and_resumes(self, workshop, fit, serve, monkeypatch, capfd):
        monkeypatch.setattr("specforge.data.features.servers.PATIENCE", 0.3)
        words = [STEPS, "--trainer.val_check_interval=5", "--save_every_n_steps=1"]
        expected = fit("undisturbed", *words, *asked(serve(1)))
        servers = serve(2)
        servers[0].fault = lambda number: servers[0].kill() or 0 if number == 20 else None
        servers[1].fault = lambda number: servers[1].kill() or 0 if number == 20 else None
        capfd.readouterr()
        resumed = fit("resumed", *words, *asked(servers), status=1)
        shown = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert len(shown) == 1 and "no connection" in shown[0]
        assert shown[0].endswith("start the servers again, and resume the run with --ckpt_path last")
        for one in servers:
            one.fault = lambda number: None
            one.start()
        fit("resumed", *words, *asked(servers), "--ckpt_path=last")
        assert 10 > len(losses(resumed)) - 10 >= 0
        assert_same_weights(last(expected), last(resumed))


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
