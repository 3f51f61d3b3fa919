"""A package to start a plugin with: one of the examples of ``docs/plugins.md`` under another name.

``specforge/plugin_templates`` holds links to these examples, so that there is only one copy; wheels contain the files.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from specforge.checkpoints.writing import replacing_folder
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.registry import installed

TEMPLATES = Path(__file__).parents[1] / "plugin_templates"
PREFIX = "specforge-"


def write_package(name: str, folder: Path, minimal: bool = False) -> None:
    """Write a package that registers an algorithm, and passes its own tests.

    Args:
        name: Name of the algorithm and the plugin.
        folder: Folder of the package; an existing one is not replaced.
        minimal: Write an algorithm only, without data, a proposal method, a loss and a subcommand.

    Raises:
        UsageError: The name is not a Python module name or is taken, or the folder exists.
        SpecforgeError: The folder cannot be written.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UsageError(
            f"{name!r} is not a valid plugin name; allowed: lower-case letters, digits and _, starting with a letter"
        )
    taken = {plugin.name for plugin in installed().plugins} | set(installed().all(Algorithm))
    taken |= {plugin.package.removeprefix(PREFIX) for plugin in installed().plugins}
    if name in taken:
        raise UsageError(f"{name!r} is already installed; choose a name other than {', '.join(sorted(taken))}")
    template = TEMPLATES / ("minimal" if minimal else "whole")
    settings = tomllib.loads((template / "pyproject.toml").read_text(encoding="utf-8"))
    word = settings["project"]["name"].removeprefix(PREFIX)
    with replacing_folder(folder) as temporary:
        shutil.copytree(template, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        # Deepest first, so that a folder is renamed after its contents.
        for path in sorted(temporary.rglob("*"), reverse=True):
            if path.is_file():
                path.write_text(_renamed(path.read_text(encoding="utf-8"), word, name), encoding="utf-8")
            path.rename(path.with_name(path.name.replace(word, name)))


def _renamed(text: str, word: str, name: str) -> str:
    """Rename in code and commands; a title in prose, capitalised and followed by a space, is kept."""
    title = "".join(part.capitalize() for part in name.split("_"))
    return re.sub(rf"{word.capitalize()}(?=[A-Z])", title, text.replace(word, name))
