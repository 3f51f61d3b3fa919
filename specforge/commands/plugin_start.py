"""A package to begin a plugin with: one of the examples that ``docs/plugins.md`` tells of, under another name.

``plugin_templates`` holds links to these examples, which wheels hold as files: there is one copy of each.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from specforge.checkpoints.writing import written_whole
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.registry import installed

TEMPLATES = Path(__file__).parents[1] / "plugin_templates"
PREFIX = "specforge-"


def write_start(name: str, folder: Path, minimal: bool = False) -> None:
    """Write a package that registers an algorithm, and passes its own tests.

    Args:
        name: What the algorithm and the plugin are called.
        folder: Where the package goes; nothing that is there is replaced.
        minimal: An algorithm only, instead of one with data, a proposal method, a loss and a subcommand.

    Raises:
        UsageError: The name is no name of a Python module, or taken; or the folder is.
        SpecforgeError: The folder cannot be written.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UsageError(f"{name!r} cannot name a plugin; allowed: lower-case letters, digits and _, a letter first")
    taken = {plugin.name for plugin in installed().plugins} | set(installed().all(Algorithm))
    taken |= {plugin.package.removeprefix(PREFIX) for plugin in installed().plugins}
    if name in taken:
        raise UsageError(f"{name!r} is installed already; choose another name than {', '.join(sorted(taken))}")
    template = TEMPLATES / ("minimal" if minimal else "whole")
    settings = tomllib.loads((template / "pyproject.toml").read_text(encoding="utf-8"))
    word = settings["project"]["name"].removeprefix(PREFIX)
    with written_whole(folder) as beside:
        shutil.copytree(template, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        # Deepest first, so that a folder is renamed after what it holds.
        for path in sorted(beside.rglob("*"), reverse=True):
            if path.is_file():
                path.write_text(_renamed(path.read_text(encoding="utf-8"), word, name), encoding="utf-8")
            path.rename(path.with_name(path.name.replace(word, name)))


def _renamed(text: str, word: str, name: str) -> str:
    """Rename what code and commands say; a title in prose, a capital and a space behind it, is left as it is."""
    title = "".join(part.capitalize() for part in name.split("_"))
    return re.sub(rf"{word.capitalize()}(?=[A-Z])", title, text.replace(word, name))
