"""``specforge fit | validate | test``: one algorithm's module and data under a Lightning trainer."""

from __future__ import annotations

import argparse
import functools
import logging
import warnings
from pathlib import Path

from specforge.commands.wrapping import wrap_hanging, wrap_paragraphs
from specforge.errors import UsageError, describe_os_error
from specforge.hookspecs import Algorithm
from specforge.imports import without_collection
from specforge.quiet import is_verbose
from specforge.registry import installed

PURPOSES = {
    "fit": "Train a draft. The best one is written to draft/ in the folder of the run.",
    "validate": "Measure a checkpoint of a run on data.validation, and print acceptance lengths and losses. Nothing is "
    "trained or stored. Give the configuration of the run; --ckpt_path is best by default.",
    "test": "Measure a checkpoint of a run on data.test, which played no part in training or in choosing the "
    "checkpoint, and print acceptance lengths and losses. Nothing is trained or stored. Give the configuration of the "
    "run; --ckpt_path is best by default.",
}


def fit(arguments: list[str]) -> int:
    """Train a draft."""
    return _run("fit", arguments)


def validate(arguments: list[str]) -> int:
    """Measure a trained draft on the validation data."""
    return _run("validate", arguments)


def test(arguments: list[str]) -> int:
    """Measure a trained draft on the test data."""
    return _run("test", arguments)


def choose(arguments: list[str], help_text: str) -> Algorithm | None:
    """Find the algorithm that a command line asks to train; None if it only asks for help, which is printed.

    Args:
        arguments: The words after the subcommand.
        help_text: What to print.

    Raises:
        UsageError: None is chosen, or it cannot be trained.
    """
    from specforge.training.cli.config_files import choose_algorithm

    name = choose_algorithm(arguments)
    if name is None:
        if {"-h", "--help"} & set(arguments):
            print(help_text)
            return None
        files = [word for word in arguments[:1] if Path(word).suffix in (".yaml", ".yml")]
        if files:
            raise UsageError(f"{files[0]} has no flag; give a configuration file as --config {files[0]}")
        names = ", ".join(installed().all(Algorithm))
        raise UsageError(f"no algorithm is chosen; give --config FILE, or --algorithm with one of: {names}")
    algorithm = installed().find(Algorithm, name)
    if algorithm.module is None or algorithm.data is None:
        raise UsageError(f"the algorithm {name!r} can be loaded, but its plugin does not train it yet")
    from specforge.config import config_class

    config_class(name)  # whose name has to be the same
    return algorithm


def _run(subcommand: str, arguments: list[str]) -> int:
    with without_collection():
        algorithm = choose(arguments, _help(subcommand, installed().all(Algorithm)))
        if algorithm is None:
            return 0
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from specforge.training.cli.command_line import TrainingCLI

    quieten()
    try:
        TrainingCLI(algorithm, arguments, subcommand).run()
    except MisconfigurationException as error:
        raise UsageError(str(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{describe_os_error(error)}; give a path that may be used") from error
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return a parser that knows the settings of every algorithm."""
    from specforge.commands.completion import add_options

    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for algorithm in installed().all(Algorithm).values():
        if algorithm.module is not None and algorithm.data is not None:
            add_options(settings_parser(algorithm), parser)
    return parser


def settings_parser(algorithm: Algorithm) -> argparse.ArgumentParser:
    """Return the parser of all settings of an algorithm; nothing is run."""
    from jsonargparse import capture_parser

    from specforge.training.cli.command_line import TrainingCLI

    parser: argparse.ArgumentParser = capture_parser(TrainingCLI, algorithm, [], "fit")
    return parser


def _help(subcommand: str, algorithms: dict[str, Algorithm]) -> str:
    rows = [wrap_hanging(f"  {name:<12} ", one.summary) for name, one in sorted(algorithms.items())]
    return "\n".join(
        [
            f"usage: specforge {subcommand} --config FILE [--config FILE ...] [--KEY VALUE ...]",
            "",
            wrap_paragraphs(PURPOSES[subcommand]),
            "",
            wrap_paragraphs(
                "A configuration names an algorithm, a verifier, and the settings of trainer, model and data. Later "
                "files go over earlier ones, flags over files: --model.ttt_steps 5, --trainer.max_epochs 2."
            ),
            "",
            "algorithms:",
            *rows,
            "",
            "Ready configurations:       configs/ and configs/models/, docs/recipes.md",
            f"All settings of one:        specforge {subcommand} --algorithm NAME --help",
            f"A whole configuration:      specforge {subcommand} --config FILE --print_config",
        ]
    )


@functools.cache
def quieten() -> None:
    """Leave out what concerns neither the user's data nor their settings."""
    if is_verbose():
        return
    # Their warnings are shown, their reports are not. Set after the import of Lightning, which sets it, too.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _drop("lightning.pytorch.trainer.connectors.checkpoint_connector", "weights_only")
    for message in (
        "LeafSpec",
        "does not have many workers",
        "LightningCLI's args parameter",
        "callbacks used to create",
        "sync_dist=True",
        "trying to `self.log",  # barebones logs nothing, as its name says
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _drop(logger: str, text: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())
