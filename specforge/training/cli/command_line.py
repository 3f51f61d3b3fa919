"""The LightningCLI of ``specforge fit | validate | test``, built around the classes of one algorithm."""

from __future__ import annotations

import argparse
import signal
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pydantic import ValidationError

from specforge.bounds import Interval, VerifierType
from specforge.errors import SpecforgeError, UsageError, describe_os_error
from specforge.hookspecs import Algorithm
from specforge.private.lightning import name_run
from specforge.registry import installed
from specforge.training.callbacks.checkpoints import BestCheckpoint
from specforge.training.callbacks.configuration import RunConfig
from specforge.training.callbacks.fit import RunCallbacks
from specforge.training.callbacks.stopping import explain_lost
from specforge.training.claims import claim
from specforge.training.cli.config_errors import check_files, check_values, explain, explain_class, explain_settings
from specforge.training.cli.numbers import whole_numbers
from specforge.training.cli.precision import check_precision
from specforge.training.cli.settings_help import SettingsParser
from specforge.training.cli.trainer_values import explain_trainer
from specforge.training.length import settle_length
from specforge.training.metrics import results_text
from specforge.training.runs import CHECKPOINTS, check_name, resolve_checkpoint
from specforge.training.saying import say
from specforge.training.strategies import FSDP2, FSDP2Strategy

# Changes of Lightning's defaults. Under FSDP2, parameters unsharded in inference mode cannot be trained afterwards.
TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "inference_mode": False,
}

StrategyRegistry.register(FSDP2, FSDP2Strategy, description="Shards the draft over all processes")


class TrainingCLI(LightningCLI):
    """Parses the configuration and builds trainer, module and data; the command then calls ``run``.

    Args:
        algorithm: The algorithm whose classes are built.
        arguments: The words after the subcommand.
        subcommand: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        UsageError: The configuration is wrong; nothing has been loaded.
    """

    def __init__(self, algorithm: Algorithm, arguments: list[str], subcommand: str) -> None:
        self.algorithm = algorithm
        self.arguments = arguments
        self.subcommand_name = subcommand
        self._claims = ExitStack()
        super().__init__(
            model_class=installed().load(algorithm, "module"),
            datamodule_class=installed().load(algorithm, "data"),
            save_config_callback=RunConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_class=SettingsParser,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": f"specforge {subcommand}",
                "usage": f"specforge {subcommand} --config FILE [--config FILE ...] [--KEY VALUE ...]",
                "description": f"Settings of {algorithm.name}. {algorithm.summary}.",
            },
            auto_configure_optimizers=False,
            run=False,
            args=arguments,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Lightning's key for the seed."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="Seed of all randomness; true draws one.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the whole run, before trainer, model and data."""
        parser.add_argument("--algorithm", type=str, default=self.algorithm.name, help="Which algorithm to train.")
        parser.add_argument("--verifier", type=str, required=True, help="Folder or hub id of the verifier.")
        parser.add_argument(
            "--verifier_dtype",
            type=VerifierType,
            default="auto",
            help="Dtype of its weights; auto: as stored, but float32 without an accelerator or AMX.",
        )
        parser.add_argument("--verifier_revision", type=str | None, default=None, help="Its branch, tag or commit.")
        parser.add_argument("--trust_remote_code", type=bool, default=False, help="Run code from its repository.")
        parser.add_argument(
            "--verifier_sharding",
            type=bool,
            default=False,
            help="Split its layers over all processes, if it does not fit in each.",
        )
        parser.add_argument(
            "--output_dir",
            type=str,
            default=f"runs/{self.algorithm.name}",
            help="Folder of the runs; each run gets a folder version_N there.",
        )
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Name of the run, and of its folder in output_dir instead of version_N.",
        )
        parser.add_argument(
            "--save_every_n_steps", type=Interval, default=500, help="Optimizer steps between two checkpoints."
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to resume from or to evaluate: a file, or last or best of the newest run; auto is last, "
            "or a new run if there is none, for jobs that restart automatically.",
        )
        super().add_core_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Pass the verifier's keys to module and data, and add the run's own callbacks."""
        for name in ("verifier", "verifier_revision", "trust_remote_code"):
            parser.link_arguments(name, f"model.{name}")
            parser.link_arguments(name, f"data.{name}")
        for name in ("verifier_dtype", "verifier_sharding"):
            parser.link_arguments(name, f"model.{name}")
        parser.add_class_arguments(RunCallbacks, "callbacks")
        parser.set_defaults({f"callbacks.{name}": one for name, one in RunCallbacks.defaults().items()})
        parser.link_arguments("save_every_n_steps", "callbacks.last_checkpoint.init_args.every_n_steps", int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the configuration and make all checks that need no data."""
        self.config = parse(parser, self.arguments)

    def instantiate_classes(self) -> None:
        """Build module, data and trainer, without loading anything."""
        try:
            super().instantiate_classes()
        except ValidationError as error:
            raise UsageError(explain_settings(error, self.parser, self.arguments)) from None
        except ValueError as error:
            reason = explain_class(str(error))
            if reason is None:
                raise
            raise UsageError(f"trainer: {reason}") from error

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and check for test data before anything is built."""
        wanted = self.config.ckpt_path
        if wanted is None and self.subcommand_name != "fit":
            wanted = "best"
        output_dir, name = Path(self.config.output_dir), self.config.run_name
        if name is not None:
            check_name(name)
        self.checkpoint = resolve_checkpoint(wanted, output_dir, name) if wanted else None
        if self.subcommand_name == "test" and not self.config.data.get("test"):
            raise UsageError("data.test is not set; give a source of test rows")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer, by default with a TensorBoard logger in the run's folder."""
        settings, own = self.config_init["trainer"], self.config_init["callbacks"]
        # A trial run of a few batches, or one for timing, stores nothing.
        stores = self.subcommand_name == "fit" and not settings["fast_dev_run"] and not settings["barebones"]
        if settings["enable_progress_bar"] is False or settings["barebones"]:
            own.progress_bar = None
        if settings["default_root_dir"] is None:
            kwargs["default_root_dir"] = self.config.output_dir
        with ExitStack() as refused:
            refused.callback(self._claims.close)
            try:
                if stores:
                    callbacks = own.present()
                    self._store_run(settings, kwargs, own.best_checkpoint)
                else:
                    callbacks = own.present("progress_bar", *["summary"] * (self.subcommand_name == "fit"))
                    kwargs["logger"], self.save_config_callback = False, None
                kwargs["callbacks"] = [*_as_list(settings["callbacks"]), *callbacks]
                trainer = super().instantiate_trainer(**kwargs)
            except (ValueError, TypeError, RuntimeError, KeyError, OverflowError, MisconfigurationException) as error:
                raise UsageError(f"trainer: {explain_trainer(error)}") from error
            check_precision(trainer.precision)  # trainer.plugins may override trainer.precision
            refused.pop_all()
        return trainer

    def _store_run(self, settings: Any, kwargs: dict[str, Any], best: BestCheckpoint) -> None:
        """Claim the run's folder for logs, checkpoints and the configuration."""
        config = self.config
        run = claim(self._claims, Path(config.output_dir), config.run_name, config.ckpt_path, self.checkpoint)
        if settings["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(run.parent, name="", version=run.name)
        for logger in _as_list(settings["logger"]):
            name_run(logger, config.run_name or f"{run.parent.resolve().name}/{run.name}")
        best.dirpath = str(run / CHECKPOINTS)
        self.save_config_kwargs = {"arguments": self.arguments, "folder": run}

    def run(self) -> None:
        """Fit, validate or test, then release the run's folder."""
        with self._claims:
            try:
                self._call_trainer()
            except SIGTERMException:
                # Lightning would leave with status 0; it alone handles the signal before training and in a validation.
                where = "before the first checkpoint" if self.subcommand_name == "fit" else "before the end"
                say(f"\nStopped by SIGTERM {where}; start the same command again.")
                raise SystemExit(128 + signal.SIGTERM) from None
            except SystemExit as leaving:
                # Lightning ends a run with status 1 when Ctrl-C interrupts it.
                if isinstance(leaving.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise

    def _call_trainer(self) -> None:
        method = getattr(self.trainer, self.subcommand_name)
        measures = self.subcommand_name != "fit"
        # Lightning's own table of results has them in the order in which they were computed.
        options = {"verbose": False} if measures else {}
        try:
            with _explaining_loggers(self.trainer):
                method(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint, weights_only=True, **options)
            if measures:
                say(results_text(self.trainer.callback_metrics))
        except BrokenPipeError:
            raise
        except OSError as error:
            if self.trainer.global_step == 0:
                is_of_a_path = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError)
                kind = UsageError if is_of_a_path else SpecforgeError
                raise kind(f"the run did not start: {describe_os_error(error)}") from error
            raise SpecforgeError(
                f"the run in {self.config.output_dir} stopped: {error}. Earlier checkpoints are complete; when "
                "there is space and permission to write, resume with --ckpt_path last"
            ) from error
        except (RuntimeError, ValueError) as error:
            reason = explain_lost(error)
            if reason is None:
                raise
            raise SpecforgeError(
                f"rank {self.trainer.global_rank} stopped at step {self.trainer.global_step}: {reason}. Then resume "
                "with --ckpt_path last"
            ) from error


@contextmanager
def _explaining_loggers(trainer: Trainer) -> Iterator[None]:
    """Report an error of a logger, such as one of a service that wants a key, in one message.

    Raises:
        UsageError: It arose before the first step.
        SpecforgeError: It arose later.
    """
    try:
        yield
    except Exception as error:  # every service has its own
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        failed = next((one for frame in frames if isinstance(one := frame.f_locals.get("self"), Logger)), None)
        if failed is None or isinstance(error, OSError | SpecforgeError):
            raise
        what = f"{type(failed).__name__}: {next(iter(str(error).splitlines()), type(error).__name__)}"
        if trainer.global_step == 0:
            raise UsageError(f"trainer.logger: {what}") from error
        raise SpecforgeError(
            f"trainer.logger stopped the run at step {trainer.global_step}: {what}. Then resume with --ckpt_path last"
        ) from error


def _as_list(given: Any) -> list[Any]:
    """Return the value of a key for one or several objects as a list."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def parse(parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
    """Parse a command line and its configuration files.

    Raises:
        UsageError: Names the key, the allowed values and the closest valid name.
    """
    check_files(parser, arguments)
    try:
        config = parser.parse_args(whole_numbers(parser, arguments))
    except argparse.ArgumentError as error:
        raise UsageError(explain(str(error), parser, arguments)) from None
    check_values(config, parser, arguments)
    settle_length(config.trainer)
    return config
