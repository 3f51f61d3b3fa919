"""An estimate of a run, from its configuration."""

from __future__ import annotations

import shlex
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from tqdm import tqdm

from specforge.commands.estimate.command import FLAGS
from specforge.commands.estimate.table import print_estimate
from specforge.commands.trainer import quieten
from specforge.errors import UsageError
from specforge.estimation.device import measured_flops
from specforge.estimation.estimate import ACCELERATOR_UTILISATION, CPU_UTILISATION, Estimate, RunPlan, flops_per_token
from specforge.estimation.step import DryRun, StepMemory
from specforge.estimation.text import RunText, counted_text, given_text
from specforge.hookspecs import Algorithm
from specforge.training.cli.command_line import TrainingCLI
from specforge.training.module import DraftModule
from specforge.verifier.loading import processor_dtype


class EstimateCLI(TrainingCLI):
    """The command line of ``fit`` with the flags of ``estimate``; builds only module and data."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this command's own flags to those of a run."""
        parser.add_argument(
            "--tokens", type=PositiveInt | None, default=None, help="Tokens per epoch; null counts the rows."
        )
        parser.add_argument(
            "--supervised_share", type=ClosedUnitInterval, default=1.0, help="Share of supervised tokens."
        )
        parser.add_argument(
            "--device_flops",
            type=PositiveFloat | None,
            default=None,
            help="Operations per second of one device on large matrix products; null measures them here.",
        )
        super().add_core_arguments_to_parser(parser)

    def before_instantiate_classes(self) -> None:
        """Require no checkpoint, and no rows if tokens are given."""
        if self.config.tokens is not None:
            self.parser.add_instantiator(lambda *_, **__: None, self.datamodule_class, subclasses=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a trainer on the CPU with the precision of the run; it runs nothing."""
        try:
            return Trainer(
                accelerator="cpu",
                devices=1,
                precision=self.config.trainer.precision,
                logger=False,
                enable_checkpointing=False,
            )
        except (ValueError, TypeError, MisconfigurationException, ImportError) as error:
            raise UsageError(f"trainer.precision: {error}") from error


def print_estimate_of(algorithm: Algorithm, arguments: list[str]) -> None:
    """Estimate a run, and print the table and the command that starts it.

    Args:
        algorithm: The algorithm that is trained.
        arguments: Those of ``specforge estimate``.
    """
    quieten()
    cli = EstimateCLI(algorithm, arguments, "estimate")
    found = estimate(cli)
    title = f"{algorithm.name}: {found.trained:,} trained weights, for {cli.config.verifier}"
    print_estimate(found, title, _assumptions(found, cli), Console(highlight=False))
    print(f"\nTo start it:\n  {shlex.join(['specforge', 'fit', *_without_own(arguments)])}")


def estimate(cli: EstimateCLI) -> Estimate:
    """Estimate the run of a configuration.

    Args:
        cli: The parsed configuration; its module cannot be used afterwards.

    Raises:
        UsageError: There are no rows and no ``--tokens``, or the run has no end.
    """
    config, module, plan = cli.config, cli.model, _plan(cli.config)
    text = _text(cli)
    # Schedules and stages span the steps of the run.
    cli.trainer.fit_loop.epoch_loop.max_steps = plan.steps(text.packed_rows)
    dry_run = DryRun(module, cli.trainer, _verifier_dtype(module, config), on_accelerator=not _on_cpu(config))
    # disable=None shows the bar on a terminal only; delay hides it for small models.
    batches = tqdm(text.batches, desc="running a step without values", unit=" batches", disable=None, delay=2)
    costs = [dry_run.run(batch) for batch in batches]
    return Estimate(
        text=text,
        plan=plan,
        flops=flops_per_token(costs, text.batches, plan.accumulated),
        memory=StepMemory.largest([cost.memory for cost in costs]),
        trained=costs[0].trained,
        slots=len(module.aux_layers) + 1,
        width=module.teacher.config.get_text_config().hidden_size,
        device_flops=config.device_flops or measured_flops(_compute_dtype(config)),
        utilisation=CPU_UTILISATION if _on_cpu(config) else ACCELERATOR_UTILISATION,
    )


def _text(cli: EstimateCLI) -> RunText:
    config = cli.config
    if config.tokens is not None:
        return given_text(config.tokens, config.supervised_share, config.data)
    return counted_text(cli.datamodule, config.data.train)


def _verifier_dtype(module: DraftModule, config: Any) -> torch.dtype:
    """Return the dtype of the verifier's weights on the device of the run, which may be another machine."""
    loading, stored = module.teacher.loading, module.teacher.config.get_text_config().dtype
    if loading.dtype != "auto":
        return loading.torch_dtype(stored)
    return processor_dtype(stored) if _on_cpu(config) else stored or torch.bfloat16


def _on_cpu(config: Any) -> bool:
    """Return whether the run is for a CPU; a given rate means another device than this one."""
    here = config.device_flops is None and not torch.accelerator.is_available()
    return config.trainer.accelerator == "cpu" or (config.trainer.accelerator == "auto" and here)


def _compute_dtype(config: Any) -> torch.dtype:
    precision = str(config.trainer.precision or "32")
    return torch.bfloat16 if "bf16" in precision else torch.float16 if precision.startswith("16") else torch.float32


def _plan(config: Any) -> RunPlan:
    trainer, devices = config.trainer, config.trainer.devices
    number = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    epochs = trainer.max_epochs if (trainer.max_epochs or 0) > 0 else None
    steps = trainer.max_steps if trainer.max_steps > 0 else None
    if epochs is None and steps is None:  # a trial run of a few batches (fast_dev_run)
        raise UsageError("set trainer.max_epochs or trainer.max_steps; otherwise the run does not end")
    limit = trainer.limit_train_batches
    return RunPlan(
        batch_size=config.data.batch_size,
        devices=number * trainer.num_nodes,
        accumulated=trainer.accumulate_grad_batches,
        max_epochs=epochs,
        max_steps=steps,
        limit=1.0 if limit is None else limit,
    )


def _assumptions(found: Estimate, cli: EstimateCLI) -> list[str]:
    config, batches = cli.config, len(found.text.batches)
    rate = "given" if config.device_flops else "measured on this machine under its current load"
    name = str(_verifier_dtype(cli.model, config)).removeprefix("torch.")
    precision = config.trainer.precision or "32-true"
    return [
        f"Text {found.text.origin}.",
        f"Operations are counted over {batches} batch{'es' * (batches > 1)}, with padding spread over the other "
        "tokens: only matrix products and attention, each query with each key of its document.",
        f"Memory: verifier in {name}, precision {precision}; draft, gradients and optimizer complete on each device, "
        "not sharded. The device's own context, fragmentation and communication buffers are not included.",
        f"Time: the rate is {rate}; devices do not wait for data or each other. Validation, loading and saving are "
        "not included, and models too small to fill the device reach less than this utilisation.",
        "Disk: only values and scales.",
        *cli.model.unestimated_costs,
    ]


def _without_own(arguments: list[str]) -> list[str]:
    """Drop the flags that ``fit`` does not have."""
    kept, skip = [], False
    for word in arguments:
        own = word.partition("=")[0] in FLAGS
        if not own and not skip:
            kept.append(word)
        skip = own and "=" not in word
    return kept
