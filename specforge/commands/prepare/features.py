"""``specforge prepare features``: store a verifier's states once, so that ``fit`` reads them instead of running it."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from specforge.bounds import FeatureType
from specforge.commands.endpoints import (
    add_endpoint_flags,
    check_endpoint_flags,
    chosen_transport,
    endpoint_settings,
    positive,
)
from specforge.commands.trainer import quieten
from specforge.commands.units import in_units
from specforge.commands.wrapping import HelpFormatter, wrap_hanging
from specforge.errors import UsageError
from specforge.imports import without_collection

if TYPE_CHECKING:
    from specforge.data.features.manifest import Manifest
    from specforge.data.features.plan import ShardPlan
    from specforge.data.features.transports import Transport

INDEX = ".files.npz"  # of a folder given as --from_vllm, until the store is complete
DESCRIPTION = """\
Run the verifier over token rows once, in this process or in serving engines, and store the states that drafts are
trained on.

  specforge prepare features --config FILE --output features
  specforge prepare features rows/train rows/validation --config FILE \\
    --output features --dtype float8_e4m3fn
  specforge prepare features rows/train --algorithm NAME --verifier MODEL \\
    --output features
  specforge prepare features --config FILE --output features \\
    --endpoint http://localhost:8000/v1

The rows are those of the configuration (data.train, data.validation, ...) unless sources are given, which come first
and replace them.
All other flags are those of specforge fit: the configuration sets the layers to read and the length of rows.

An interrupted run resumes when the same command is run again. The same command in several processes, under torchrun or
not, on one machine or several with a shared folder, splits the work.

An endpoint is a vLLM server started with the command line that specforge serve-verifier --print prints."""


def run(arguments: list[str]) -> int:
    """Capture missing states, and print the contents of the store and the savings."""
    sources = list(takewhile(lambda word: not word.startswith("-"), arguments))
    try:
        found, words = command_line().parse_known_args(arguments[len(sources) :])
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from None
    with without_collection():
        from specforge.commands.configured import module_and_data, verifier_states
        from specforge.data.features.capturing import LiveStates
        from specforge.data.features.importing import VllmStates
        from specforge.data.features.plan import ShardPlan
        from specforge.data.features.preparing import States, prepare_features
        from specforge.data.features.store import FeatureStore
        from specforge.data.text.sources import check_source

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
    check_endpoint_flags(found)
    if found.endpoint and found.from_vllm is not None:
        raise UsageError("--endpoint and --from_vllm exclude each other: give one source of states")
    module, data = module_and_data(words, sources)
    needs = module.feature_needs
    manifest = data.feature_manifest(needs, found.dtype)
    plan = ShardPlan([data.rows_of(source) for source in sources or data.sources], needs, manifest.token_bytes)
    manifest = replace(manifest, rows_identity=plan.identity)
    if found.endpoint:
        whole = _ask(found, chosen_transport(found.transport, data), plan, manifest, output)
    else:
        states: States = LiveStates(partial(verifier_states, module.teacher, module.aux_layers), found.batch_tokens)
        if found.from_vllm is not None:
            states = VllmStates(Path(found.from_vllm), plan, manifest.layers, manifest.width, output / INDEX)
        whole = prepare_features(plan, manifest, output, states)
        if whole is not None:
            (output / INDEX).unlink(missing_ok=True)
    if whole is None:
        print(
            f"Done here: other processes still write shards of {output}; the last to finish writes the manifest. If "
            "none is running any longer, run the same command again."
        )
        return 0
    _print_savings(plan, whole)
    print(f"\n{_closing_line(words, sources, output)}")
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
        type=positive,
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
    add_endpoint_flags(parser)
    parser.add_argument(
        "--concurrency", type=positive, default=64, metavar="N", help="With --endpoint: total number of rows in flight."
    )
    parser.add_argument("--verify", action="store_true", help="Only verify the checksums in --output.")
    return parser


def _ask(
    found: argparse.Namespace, transport: Transport, plan: ShardPlan, manifest: Manifest, output: Path
) -> Manifest | None:
    # The client takes a second to import.
    from specforge.data.features.asking import AskedStates
    from specforge.data.features.preparing import prepare_features

    settings = endpoint_settings(found, found.concurrency)
    with AskedStates(settings, transport, manifest, output) as states:
        return prepare_features(plan, manifest, output, states, ahead=settings.concurrency, written=states.forget)


def _print_savings(plan: ShardPlan, manifest: Manifest) -> None:
    from specforge.data.features.manifest import describe_layers

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


def _closing_line(words: list[str], sources: list[str], output: Path) -> str:
    """Return the command that trains on the store; of given sources, the first is for training."""
    # Without a second source, some of the first one's rows are held out for validation.
    splits = zip(("train", "validation"), [*sources, "null"], strict=False) if sources else ()
    named = [f"--data.{split}={source}" for split, source in splits]
    command = shlex.join(["specforge", "fit", *words, *named, "--data.features", str(output)])
    return f"Done: {output} holds the features. To train on them:\n  {command}"
