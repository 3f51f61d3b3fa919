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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algorithm")
    flag: str | None = parser.parse_known_args(arguments)[0].algorithm
    named = [values["algorithm"] for values in map(_read_yaml, config_files(arguments)) if "algorithm" in values]
    return flag or (str(named[-1]) if named else None)


def config_files(arguments: list[str]) -> list[Path]:
    """Return the files that ``--config`` names, in order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[], type=Path)
    return list(parser.parse_known_args(arguments)[0].config)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{path}:{line} is not valid YAML: {error.problem or error.context}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold keys and values, for example 'algorithm: NAME'")
    return values
