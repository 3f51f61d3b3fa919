"""The configuration files of a command line, read before anything heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from specforge.errors import UsageError, nearest_path

DEEPEST = 32  # levels; a configuration has about six
MOST_VALUES = 100_000


def choose_algorithm(arguments: list[str]) -> str | None:
    """Return the algorithm of a command line: ``--algorithm``, else that key of the last file that has it.

    Raises:
        UsageError: A configuration file is missing or not YAML.
    """
    flag: str | None = _flags(arguments).algorithm
    named = [values["algorithm"] for values in map(read_yaml, config_files(arguments)) if values.get("algorithm")]
    if named and not isinstance(named[-1], str):
        raise UsageError(f"algorithm: expected a name, got {named[-1]!r}")
    return flag or (named[-1] if named else None)


def config_files(arguments: list[str]) -> list[Path]:
    """Return the files that ``--config`` names, in order."""
    return list(_flags(arguments).config)


def _flags(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--algorithm")
    parser.add_argument("-c", "--config", action="append", default=[], type=Path)
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise UsageError(f"{str(error.argument_name).rpartition('/')[2]} needs a value") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UsageError: It is missing, is not YAML, does not hold keys and values, sets a key twice, or holds more than a
            configuration can.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _check_nodes(path, yaml.compose(text, Loader=yaml.SafeLoader))
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(
            f"--config {path}: there is no such file (working directory {Path.cwd()}).{nearest_path(path)}"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"--config {path} is a folder; give a YAML file.{nearest_path(path)}") from None
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{path}:{line} is not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UsageError(f"{path}: more than {DEEPEST} nested levels of keys or lists") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, a number of thousands of digits
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold keys and values, for example 'algorithm: NAME'")
    return values


def _check_nodes(path: Path, root: yaml.Node | None) -> None:
    """Refuse files that later parsers would misread or never finish.

    Aliases share nodes, so a few lines may stand for billions of values: each node is counted once, with the size of
    its content.
    """
    sizes: dict[yaml.Node, int] = {}
    inside: list[yaml.Node] = []

    def size(node: yaml.Node) -> int:
        where = f"{path}:{node.start_mark.line + 1}"
        if node in inside:
            raise UsageError(f"{where} contains itself: an alias (*) names a value that contains it")
        if len(inside) > DEEPEST:
            raise UsageError(f"{where}: more than {DEEPEST} nested levels of keys or lists")
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise UsageError(f"{where}: the character NUL is not allowed in a configuration")
        if node not in sizes:
            inside.append(node)
            sizes[node] = 1 + sum(size(one) for one in _children(path, node))
            inside.pop()
            if sizes[node] > MOST_VALUES:
                raise UsageError(f"{where} holds more than {MOST_VALUES:,} values, with its aliases (*) expanded")
        return sizes[node]

    if root is not None:
        size(root)


def _children(path: Path, node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a group of keys"
            raise UsageError(f"{path}:{line}: a key must be text, got {shown}")
        if key.value in lines:
            raise UsageError(f"{path}:{line}: {key.value} is set twice, first in line {lines[key.value]}")
        lines[key.value] = line
    return [value for _, value in node.value]
