"""Output of ``specforge plugins``, and its template."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from specforge.__main__ import main
from specforge.commands import plugin_start
from specforge.commands.plugins import describe
from specforge.hookspecs import Algorithm, Command, Objective
from specforge.registry import Plugin, installed


def test_heading_and_one_line_per_contribution():
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


def test_faults_come_after_contributions():
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


def register(package: Path) -> None:
    """Add the metadata of an installation to a package on the path."""
    settings = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    folder = package / f"{settings['name'].replace('-', '_')}-{settings['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {settings['name']}\nVersion: 0.1.0\n")
    [(group, points)] = settings["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {module}" for name, module in points.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("options", [[], ["--minimal"]])
def test_a_new_plugin_passes_its_own_tests(tmp_path, capsys, options):
    package = tmp_path / "mine"
    assert main(["plugins", "new", "my_heads", "--output", str(package), *options]) == 0
    assert f"pytest {package}" in capsys.readouterr().out
    register(package)
    path = os.pathsep.join([str(package), *sys.path])
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(words, cwd=package, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0 and "passed" in ran.stdout, ran.stdout + ran.stderr


def test_a_drafter_that_is_one_off_is_found_by_check(tmp_path):
    package = tmp_path / "mine"
    assert main(["plugins", "new", "my_heads", "--output", str(package)]) == 0
    register(package)
    drafter = package / "specforge_my_heads" / "drafter.py"
    source = drafter.read_text()
    assert "counts - 1" in source
    drafter.write_text(source.replace("counts - 1", "counts - 2"))
    path = os.pathsep.join([str(package), *sys.path])
    words = [sys.executable, "-m", "specforge", "plugins", "check", "my_heads", "--", "--model.heads", "2"]
    ran = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 1
    shown = ran.stdout.splitlines()
    [fault] = [number for number, line in enumerate(shown) if line.startswith("FAULT")]
    assert "the drafter agrees with unroll" in shown[fault] and "draft step 0: logits are" in shown[fault + 1]
    # The text is the verifier's own whatever a draft proposes.
    found = [line.split(":")[0] for line in shown if "the text is the verifier's own" in line]
    assert {"ok     greedy", "ok     dynamic_tree", "ok     my_heads_tree"} <= set(found)
    assert "1 of the checks above" in ran.stderr and "Traceback" not in ran.stderr


def test_check_refuses_what_it_cannot_run(capsys):
    assert main(["plugins", "check", "nosuch"]) == 2
    assert "no installed plugin provides the algorithm 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(("template", "options"), [("whole", []), ("minimal", ["--minimal"])])
def test_a_new_plugin_has_its_name_everywhere(tmp_path, template, options):
    package = tmp_path / "mine"
    assert main(["plugins", "new", "my_heads", "--output", str(package), *options]) == 0
    template = plugin_start.TEMPLATES / template
    word = tomllib.loads((template / "pyproject.toml").read_text())["project"]["name"].removeprefix("specforge-")
    files = [path for path in package.rglob("*") if path.is_file()]
    assert {"__init__.py", "model.py", "test_my_heads.py", "pyproject.toml"} <= {path.name for path in files}
    assert not [path for path in files if word in str(path.relative_to(package)) or word in path.read_text()]
    assert "class MyHeadsModel(" in (package / "specforge_my_heads" / "model.py").read_text()


@pytest.mark.parametrize("name", ["My", "1st", "with-dash", "eagle3", "core", "lightning"])
def test_an_invalid_name(name, tmp_path, capsys):
    assert main(["plugins", "new", name, "--output", str(tmp_path / "mine")]) == 2
    assert repr(name) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_new_plugin_replaces_nothing(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert main(["plugins", "new", "my_heads", "--output", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
