"""What ``specforge plugins`` prints of a plugin."""

from __future__ import annotations

import pytest

from specforge.__main__ import main
from specforge.commands.plugins import describe
from specforge.hookspecs import Algorithm, Command, Objective
from specforge.registry import Plugin, installed


def test_head_and_one_line_a_contribution():
    plugin = Plugin(
        "toy", "toy-package", "0.1", [Objective("loss", "a loss", "toy:loss"), Command("go", "goes", "t:g")]
    )
    lines = [line.split() for line in describe(plugin).splitlines()]
    assert lines == [
        ["toy", "(toy-package", "0.1)"],
        ["objective", "loss", "a", "loss"],
        ["command", "go", "goes"],
    ]


def test_algorithm_that_only_loads_is_marked():
    loads = Algorithm("toy", "a toy", "toy:Config", "toy:Draft")
    trains = Algorithm("toy", "a toy", "toy:Config", "toy:Draft", "toy:Module", "toy:Data")
    assert "training is not provided" in describe(Plugin("toy", "toy-package", "0.1", [loads]))
    assert "training is not provided" not in describe(Plugin("toy", "toy-package", "0.1", [trains]))


def test_faults_stand_below_what_works():
    plugin = Plugin("toy", "toy-package", "0.1", [Objective("loss", "a loss", "toy:loss")], ["first", "second"])
    assert [line.strip() for line in describe(plugin).splitlines()[2:]] == ["FAULT: first", "FAULT: second"]


def test_nothing_contributed():
    assert describe(Plugin("toy", "toy-package", "0.1")).splitlines()[1:] == ["  contributes nothing yet"]
    assert "contributes nothing" not in describe(Plugin("toy", "toy-package", "0.1", faults=["broken"]))


def test_lists_every_installed_plugin_without_faults(capsys):
    assert main(["plugins"]) == 0
    shown = capsys.readouterr().out
    for plugin in installed().plugins:
        assert f"{plugin.name}  ({plugin.package} {plugin.version})" in shown
    assert "FAULT" not in shown
    assert {"core", "eagle3"} <= {plugin.name for plugin in installed().plugins}


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["plugins", "--help"])
    assert left.value.code == 0
    assert "usage: specforge plugins" in capsys.readouterr().out


def test_stray_word(capsys):
    try:
        status = main(["plugins", "stray"])
    except SystemExit as left:
        status = left.code
    assert status == 2
    assert "stray" in capsys.readouterr().err
