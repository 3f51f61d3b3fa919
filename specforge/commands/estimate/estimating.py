"""An estimate of a run, from its configuration."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
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
from specforge.commands.units import duration, in_units
from specforge.data.module import LIVE, RECORD
from specforge.data.text.sources import check_source
from specforge.errors import UsageError
from specforge.estimation.device import measured_flops
from specforge.estimation.estimate import ACCELERATOR_UTILISATION, CPU_UTILISATION, Estimate, RunPlan, flops_per_token
from specforge.estimation.step import DryRun, StepMemory
from specforge.estimation.text import RunText, counted_text, given_text
from specforge.hookspecs import Algorithm
from specforge.training.cli.command_line import TrainingCLI
from specforge.training.cli.config_files import config_files
from specforge.training.module import DraftModule
from specforge.verifier.loading import processor_dtype

SIZES = "verifiers"  # folder beside a recipe: a config.json for each hub id
# Bytes per second of a GPU's links: NVLink 4 in one direction, and an adapter of 400 Gb/s.
NVLINK, NETWORK = 450e9, 50e9


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
        parser.add_argument(
            "--device_memory", type=PositiveFloat | None, default=None, help="Bytes of memory of one device."
        )
        super().add_core_arguments_to_parser(parser)

    def before_instantiate_classes(self) -> None:
        """Require no checkpoint, no rows if tokens are given, and no hub for a verifier whose sizes are at hand."""
        config = self.config
        if not Path(config.verifier).is_dir() and config.verifier_revision is None:
            beside = (path.parent / SIZES / config.verifier for path in config_files(self.arguments))
            config.model.verifier = str(next((one for one in beside if one.is_dir()), config.verifier))
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
    print(f"\n{_closing_lines(found, cli, _without_own(arguments))}")


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
        verifier_layers=dry_run.verifier_layers,
        is_split=config.verifier_sharding and plan.devices > 1,
        device_memory=config.device_memory or _memory_here(config),
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


def _memory_here(config: Any) -> float | None:
    """Return the memory of this machine's accelerator; None if the run is for another device."""
    if _on_cpu(config) or config.device_flops is not None or not torch.accelerator.is_available():
        return None
    return float(torch.accelerator.get_memory_info()[1])


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
        f"Memory: verifier in {name}{_split(found)}, precision {precision}; draft, gradients and optimizer complete on "
        "each device, not sharded. The device's own context, fragmentation and communication buffers are not included.",
        f"Time: the rate is {rate}; devices do not wait for data or each other. Validation, loading and saving are "
        "not included, and models too small to fill the device reach less than this utilisation.",
        *_gathering(found),
        "Disk: only values and scales.",
        *([f"Sizes of the verifier: {config.model.verifier}."] if config.model.verifier != config.verifier else []),
        *cli.model.unestimated_costs,
    ]


def _split(found: Estimate) -> str:
    return f", its layers split over {found.plan.devices} devices and two gathered at a time" if found.is_split else ""


def _gathering(found: Estimate) -> Iterator[str]:
    if found.is_split:
        size = found.split.gathered * found.plan.accumulated
        nvlink, network = (duration(size / rate) for rate in (NVLINK, NETWORK))
        yield (
            f"Each device receives {in_units(size, 'B')} of the split verifier's layers in an optimizer step, which is "
            f"not in the time: {nvlink} at {in_units(NVLINK, 'B')}/s within a machine, {network} at "
            f"{in_units(NETWORK, 'B')}/s between machines; part of it overlaps with computing."
        )


def _closing_lines(found: Estimate, cli: EstimateCLI, words: list[str]) -> str:
    """Return the command that starts the run, or what would make it fit on its devices."""
    is_stored = cli.config.data.features not in (LIVE, RECORD)
    needed, memory = found.memory.peak_stored if is_stored else found.device.peak, found.device_memory
    if memory is not None and not found.fits(needed):
        lines = [f"It does not fit: {in_units(needed, 'B')} on a device with {in_units(memory, 'B')}. What could fit:"]
        split = found.split.on_each(found.memory).peak
        if not is_stored and not found.is_split and found.plan.devices > 1 and found.fits(split):
            lines.append(f"  verifier_sharding: true   {in_units(split, 'B')}; the layers are gathered in every step")
        if not is_stored and found.fits(found.memory.peak_stored):
            lines.append(
                f"  stored states             {in_units(found.memory.peak_stored, 'B')}; specforge prepare features, "
                "with --endpoint for a verifier that only a server can run"
            )
        lines.append("  less of everything        smaller data.batch_size or data.max_length, fewer draft steps,")
        lines.append("                            model.activation_checkpointing: true")
        return "\n".join(lines)
    line = f"\n  {shlex.join(['specforge', 'fit', *words])}"
    try:
        check_source(cli.config.data.train, "data.train")
    except UsageError as error:
        return f"To start it, once there are rows ({error}):{line}"
    return f"To start it:{line}"


def _without_own(arguments: list[str]) -> list[str]:
    """Drop the flags that ``fit`` does not have."""
    kept, skip = [], False
    for word in arguments:
        own = word.partition("=")[0] in FLAGS
        if not own and not skip:
            kept.append(word)
        skip = own and "=" not in word
    return kept
