"""Findings of ``specforge doctor``, in this environment and in broken ones."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from specforge.__main__ import main
from specforge.commands import doctor
from specforge.registry import Plugin, installed


@pytest.fixture
def deaf_hub() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def states(look, what: str) -> list[str]:
    return [finding.state for finding in look() if finding.what == what]


def fixes(look) -> list[str]:
    return [finding.fix for finding in look() if finding.fix is not None]


def test_shows_every_section_and_the_next_command(capsys, monkeypatch):
    # The packages installed here are not the subject of this test.
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.0", "pluggy>=1.6"])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("packages", "devices", "disk", "hub", "plugins", "torch", "cpu", "caches", "core", "eagle3"):
        assert f"\n{words}" in out or f"\n  {words}" in out
    assert "FAULT" not in out
    assert out.splitlines()[-1] == "  specforge fit --config configs/quickstart.yaml"


class TestPackages:
    def test_missing_and_old_ones_are_faults(self, monkeypatch, capsys):
        monkeypatch.setattr(doctor, "requires", lambda name: ["no-such-package>=1", "pluggy>=99,<100", "torch>=2.0"])
        assert fixes(doctor.packages) == ["pip install 'no-such-package>=1'", "pip install 'pluggy<100,>=99'"]
        assert main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "FAULT: pip install 'no-such-package>=1'" in out
        assert out.splitlines()[-1] == "2 fault(s). Fix them, then run again: specforge doctor"

    def test_extras_are_not_required(self, monkeypatch):
        monkeypatch.setattr(doctor, "requires", lambda name: ["no-such-package>=1; extra == 'docs'"])
        assert list(doctor.packages()) == []

    def test_the_project_is_found_by_its_name(self):
        assert "torch" in {finding.what for finding in doctor.packages()}


class TestHub:
    def test_offline_is_not_a_fault(self):
        (state,) = states(doctor.hub, doctor.HfApi().endpoint)
        assert "HF_HUB_OFFLINE" in state
        assert not fixes(doctor.hub)

    def test_a_hub_that_never_answers_is_not_waited_for(self, deaf_hub: str, monkeypatch):
        monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", deaf_hub)
        (state,) = states(doctor.hub, deaf_hub)
        assert state.startswith("not reachable (timed out)")
        assert not fixes(doctor.hub)


def test_cpu_and_memory_of_the_machine():
    (state,) = states(doctor.devices, "cpu")
    assert state.startswith(f"{os.cpu_count()} cores, ")


def test_the_cache_folder_need_not_exist(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("SPECFORGE_CACHE", str(tmp_path / "not" / "yet"))
    (state,) = states(doctor.disk, "caches")
    assert state.startswith(f"{tmp_path / 'not' / 'yet'}: ")
    assert not (tmp_path / "not").exists()


def test_a_broken_plugin_is_a_fault(monkeypatch):
    broken = Plugin("toy", "toy-package", "0.1", faults=["ImportError: no toys", "it has 2 of the objective 'loss'"])
    monkeypatch.setattr(installed(), "plugins", [*installed().plugins, broken])
    assert fixes(doctor.plugins) == ["ImportError: no toys; it has 2 of the objective 'loss'"]


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--help"])
    assert left.value.code == 0
    assert "exit status is 1" in capsys.readouterr().out
