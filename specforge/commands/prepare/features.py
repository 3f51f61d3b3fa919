"""``specforge prepare features``: store a verifier's states once, so that ``fit`` reads them instead of running it."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from specforge.commands.trainer import quieten
from specforge.commands.units import in_units
from specforge.commands.wrapping import HelpFormatter, wrap_hanging
from specforge.data.features.capturing import LiveStates
from specforge.data.features.dtypes import FeatureType
from specforge.data.features.importing import VllmStates
from specforge.data.features.manifest import Manifest, describe_layers
from specforge.data.features.plan import ShardPlan
from specforge.data.features.preparing import States, prepare_features
from specforge.data.features.store import FeatureStore
from specforge.data.module import LIVE, DraftDataModule
from specforge.data.text.sources import check_source
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.registry import installed
from specforge.training.cli.command_line import TrainingCLI
from specforge.training.cli.config_files import choose_algorithm
from specforge.training.module import DraftModule
from specforge.training.teacher import FrozenVerifier

DESCRIPTION = """\
Run the verifier over token rows once, and store the states that drafts are trained on.

  specforge prepare features --config FILE --output features
  specforge prepare features rows/train rows/validation --config FILE \\
    --output features --dtype float8_e4m3fn
  specforge prepare features rows/train --algorithm NAME --verifier MODEL \\
    --output features

The rows are those of the configuration (data.train, data.validation, ...) unless sources are given; these come first.
All other flags are those of specforge fit: the configuration sets the layers to read and the length of rows.

An interrupted run resumes when the same command is run again. The same command in several processes, under torchrun or
not, on one machine or several with a shared folder, splits the work."""


def run(arguments: list[str]) -> int:
    """Capture missing states, and print the contents of the store and the savings."""
    sources = list(takewhile(lambda word: not word.startswith("-"), arguments))
    try:
        found, words = command_line().parse_known_args(arguments[len(sources) :])
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from None
    quieten()
    if found.output is None:
        raise UsageError("output: is required; give a folder as --output")
    output = Path(found.output)
    if found.verify:
        FeatureStore(output).check()
        print(f"Done: all checksums of {output} are correct.")
        return 0
    for source in sources:
        check_source(source, "sources")
    module, data = _module_and_data(words, sources)
    needs = module.feature_needs
    manifest = data.feature_manifest(needs, found.dtype)
    plan = ShardPlan([data.rows_of(source) for source in sources or data.sources], needs, manifest.token_bytes)
    states: States = LiveStates(partial(_states, module.teacher, module.aux_layers), found.batch_tokens)
    if found.from_vllm is not None:
        states = VllmStates(Path(found.from_vllm), plan, manifest.layers, manifest.width)
    whole = prepare_features(plan, replace(manifest, rows_identity=plan.identity), output, states)
    if whole is None:
        print(f"Done here: other processes still write shards of {output}; the last to finish writes the manifest.")
        return 0
    _print_savings(plan, whole)
    print(f"\n{_closing_line(words, output)}")
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments, without the settings of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="specforge prepare features",
        usage=wrap_hanging(
            "specforge prepare features ",
            "[SOURCE ...] --output FOLDER --config FILE [--KEY VALUE ...]",
            label="usage: ",
        ),
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--output", metavar="FOLDER", help="Folder to write; required.")
    parser.add_argument(
        "--dtype", choices=get_args(FeatureType), default="bfloat16", help="Dtype of the stored states."
    )
    parser.add_argument(
        "--batch_tokens",
        "--batch-tokens",
        type=_positive,
        default=8192,
        metavar="N",
        help="Tokens per verifier forward pass.",
    )
    parser.add_argument(
        "--from_vllm",
        "--from-vllm",
        metavar="FOLDER",
        help="Folder of states that vLLM extracted, to use instead of running the verifier.",
    )
    parser.add_argument("--verify", action="store_true", help="Only verify the checksums in --output.")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


class _Settings(TrainingCLI):
    """The module and the data of a configuration, without a trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Create none: the trainer does not manage the processes here."""
        return None


def _module_and_data(words: list[str], sources: list[str]) -> tuple[DraftModule, DraftDataModule]:
    """Build module and data of a configuration; nothing is loaded yet."""
    algorithms = installed().all(Algorithm)
    name = choose_algorithm(words)
    if name is None:
        raise UsageError(
            f"no algorithm is chosen; give --config FILE, or --algorithm with one of: {', '.join(algorithms)}"
        )
    train = ["--data.train", sources[0]] if sources else []
    # Nothing here is random, and the features named in the configuration do not exist yet.
    words = [*words, *train, "--data.features", LIVE, "--seed_everything", "false"]
    settings = _Settings(installed().find(Algorithm, name), words, "fit")
    return settings.model, settings.datamodule


def _states(teacher: FrozenVerifier, aux_layers: list[int], input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return states [B, T, L, H] of the verifier, which is loaded on first use."""
    if not teacher.is_held:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        teacher.load(torch.accelerator.current_accelerator(check_available=True))
    device = teacher.model.device
    batch = {"input_ids": input_ids.to(device), "position_ids": position_ids.to(device)}
    features = teacher.states(batch, aux_layers)
    return torch.cat([features.aux, features.last[:, :, None]], dim=2)


def _print_savings(plan: ShardPlan, manifest: Manifest) -> None:
    tokens = sum(shard.tokens for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{len(plan.kept):,} rows, {tokens:,} tokens: {in_units(size, 'B')} in {len(manifest.shards):,} file(s), "
        f"{manifest.token_bytes:,} bytes per token ({manifest.dtype})"
    )
    all_layers = manifest.layers[-1] + 1
    print(f"  {describe_layers(manifest.layers)} of {all_layers} states: {_saved(len(manifest.layers), all_layers)}")
    print(f"  identical rows stored once: {_saved(plan.unique_tokens, plan.all_tokens)}")
    if not manifest.whole_rows:
        print(f"  nothing after the last supervised token: {_saved(tokens, plan.unique_tokens)}")
    wide = replace(manifest, dtype="bfloat16")
    if manifest.token_bytes < wide.token_bytes:
        print(f"  {manifest.dtype} instead of bfloat16: {_saved(manifest.token_bytes, wide.token_bytes)}")


def _saved(size: int, without: int) -> str:
    return f"saves {1 - size / without:.1%}"


def _closing_line(words: list[str], output: Path) -> str:
    command = shlex.join(["specforge", "fit", *words, "--data.features", str(output)])
    return f"Done: {output} holds the features. To train on them:\n  {command}"
