"""``specforge export``: write a draft in the format that a server loads, with a card and a probe."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

from specforge.commands.arguments import add_verifier_flags, command_parser, loading_of, parse
from specforge.hookspecs import CheckpointFormat
from specforge.imports import without_collection
from specforge.registry import installed

if TYPE_CHECKING:
    from specforge.checkpoints.export import Export

DESCRIPTION = """\
Write a trained draft in the format that a server loads. Every rule of the reader is checked: a draft that it would
reject, drop parts of or run incorrectly is refused here, with the reason. The export is read back and must compute
what the draft computes.

  specforge export runs/quickstart/version_0 --format vllm
  specforge export RUN --format sglang --dtype bf16 --output drafts/mine \\
    --push_to_hub owner/name

Each algorithm has its own formats:
{formats}

Writes config.json, model.safetensors, README.md (training data, metric, how to serve it) and specforge_probe.json,
which lets specforge verify check it anywhere."""
TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def run(arguments: list[str]) -> int:
    """Export, upload if asked, and print how to serve the draft."""
    found = parse(command_line(), arguments)
    with without_collection():
        import torch

        from specforge.checkpoints.export import ExportRequest, export
        from specforge.checkpoints.hub import push
        from specforge.data.text.prompts import read_prompts

    done = export(
        ExportRequest(
            source=found.source,
            format=found.format,
            output=None if found.output is None else Path(found.output),
            verifier=found.verifier,
            loading=loading_of(found),
            dtype=None if found.dtype is None else getattr(torch, TYPES[found.dtype]),
            runs_verifier=not found.skip_verifier,
            prompts=None if found.prompts is None else read_prompts(found.prompts),
            served_from=found.push_to_hub,
        )
    )
    where = str(done.folder)
    if found.push_to_hub is not None:
        where = push(done.folder, found.push_to_hub)
        verifier = done.probe.verifier.name_or_path
        if Path(verifier).is_absolute():
            print(
                f"Note: config.json names the verifier by a folder of this machine, {verifier}; for other users, give "
                "its hub id as --verifier."
            )
    print(_closing(done, where))
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("export", "DRAFT --format NAME", DESCRIPTION.format(formats="\n".join(_formats())))
    parser.add_argument("source", type=str, metavar="DRAFT", help="A run folder, a draft folder or a hub id.")
    parser.add_argument("--format", type=str | None, default=None, metavar="NAME", help="Format to write; required.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="Folder to write; by default next to the draft.",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["bf16", "fp16", "fp32"] | None,
        default=None,
        metavar="{bf16,fp16,fp32}",
        help="Dtype of the weights; by default as stored.",
    )
    add_verifier_flags(parser, "Folder or hub id where readers find it; by default the draft's own.")
    parser.add_argument(
        "--prompts",
        type=str | None,
        default=None,
        metavar="FILE",
        help="The probe's prompts, JSON lines; by default four validation prompts of the run, or plain questions.",
    )
    parser.add_argument(
        "--skip_verifier",
        action="store_true",
        help="Do not run the verifier; verify --endpoint then has no expected acceptance.",
    )
    parser.add_argument(
        "--push_to_hub", type=str | None, default=None, metavar="OWNER/NAME", help="Repository to upload to."
    )
    return parser


def _formats() -> Iterator[str]:
    by_algorithm: dict[str, list[str]] = {}
    for one in installed().all(CheckpointFormat).values():
        by_algorithm.setdefault(one.algorithm, []).append(one.name)
    width = max(map(len, by_algorithm), default=0)
    for algorithm, names in by_algorithm.items():
        yield f"  {algorithm:<{width}}  {', '.join(names)}"


def _closing(done: Export, where: str) -> str:
    lines = [f"Done: {where} holds the draft in the format {done.probe.format}."]
    if done.probe.served is not None:
        expected = done.probe.served.expected(done.tokens)
        lines.append(f"  expected     {expected:.3f} tokens per verifier pass, with greedy chains of {done.tokens}")
    if done.agreement.differing:
        lines.append(f"  WARNING: {done.agreement}. The export holds the trained draft.")
    serving = done.serving.replace("\n", "\n               ")
    check = shlex.join(["specforge", "verify", str(done.folder)])
    return "\n".join(
        [*lines, f"  serve it     {serving}", f"  check it     {check}   (once it is served: --endpoint URL)"]
    )
