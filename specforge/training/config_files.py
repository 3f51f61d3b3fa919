"""The configuration files that a command line names, read before anything heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from specforge.errors import UsageError


def choose_algorithm(arguments: list[str]) -> str | None:
    """Find which algorithm a command line asks for: ``--algorithm``, else that key of the last file that has it.

    Raises:
        UsageError: A configuration file is missing or not YAML.
    """
    flag: str | None = _flags(arguments).algorithm
    named = [values["algorithm"] for values in map(read_yaml, config_files(arguments)) if values.get("algorithm")]
    return flag or (str(named[-1]) if named else None)


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
        raise UsageError(f"{str(error.argument_name).rpartition('/')[2]}: a value is missing behind it") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UsageError: It is missing, is not YAML, or does not hold keys and values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{path}:{line} is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold keys and values, for example 'algorithm: NAME'")
    return values
