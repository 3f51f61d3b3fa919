"""``specforge plugins``: list installed plugins with their faults; create a new one; check an algorithm."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from specforge.commands.plain_parser import PlainParser
from specforge.commands.plugin_start import PREFIX, write_package
from specforge.commands.wrapping import wrap_hanging
from specforge.errors import SpecforgeError
from specforge.hookspecs import Algorithm
from specforge.registry import KINDS, Plugin, installed, key_of


def run(arguments: list[str]) -> int:
    """Print every plugin with its package, version, contributions and faults; create one; or check an algorithm."""
    found = command_line().parse_args(arguments)
    if found.subcommand == "check":
        return _check(found.name, found.settings)
    if found.subcommand == "new":
        _create(found.name, found.output or Path(f"{PREFIX}{found.name}"), found.minimal)
        return 0
    for plugin in installed().plugins:
        print(describe(plugin))
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = PlainParser(prog="specforge plugins", description=run.__doc__)
    subcommands = parser.add_subparsers(dest="subcommand", metavar="{new,check}")
    summary = "create a plugin package that trains, drafts and passes its own tests"
    new = subcommands.add_parser("new", help=summary, description=summary)
    new.add_argument("name", metavar="NAME", help="name of the algorithm: lower-case letters, digits and _")
    new.add_argument("--output", type=Path, help=f"folder of the package (default: {PREFIX}NAME)")
    new.add_argument(
        "--minimal", action="store_true", help="an algorithm only, without data, proposal method, loss and subcommand"
    )
    summary = "check an algorithm on a tiny verifier: training, its checkpoint, its drafter, each proposal method"
    check = subcommands.add_parser("check", help=summary, description=summary)
    check.add_argument("name", metavar="NAME", help="an installed algorithm")
    # Without a default, argparse calls it required.
    check.add_argument(
        "settings", nargs="*", default=[], metavar="-- SETTINGS", help="flags of specforge fit: --model.heads 2"
    )
    return parser


def _check(name: str, settings: list[str]) -> int:
    from tqdm import tqdm

    from specforge.commands.plugin_check import check_algorithm

    failed = 0
    # disable=None shows the bar on a terminal only.
    checks = tqdm(check_algorithm(name, settings), f"checking {name}", unit=" checks", disable=None, leave=False)
    for what, fault in checks:
        with checks.external_write_mode():
            print(f"{'ok    ' if fault is None else 'FAULT '} {what}", flush=True)
            if fault is not None:
                failed += 1
                print(textwrap.indent(fault, " " * 7), flush=True)
    if failed:
        raise SpecforgeError(f"{name}: {failed} of the checks above found a fault; see docs/plugins.md")
    return 0


def _create(name: str, folder: Path, minimal: bool) -> None:
    write_package(name, folder, minimal)
    print(f"Done: {folder} holds a plugin with the algorithm {name}; docs/plugins.md explains each file.")
    print(f"  install it   pip install -e '{folder}[test]'")
    print(f"  check it     specforge plugins check {name}")
    print(f"  test it      pytest {folder / 'tests'}")
    print(f"  its settings specforge fit --algorithm {name} --help")
    config = folder.resolve() / f"quickstart-{name}.yaml"
    print(f"  train it     specforge fit --config {config}   (in the root of specforge's repository)")


def describe(plugin: Plugin) -> str:
    """Return a plugin's lines: a heading, and one line for each contribution and fault."""
    lines = [f"{plugin.name}  ({plugin.package} {plugin.version})"]
    for word, kind in KINDS.items():
        for descriptor in plugin.descriptors:
            if isinstance(descriptor, kind):
                note = " [loads; training is not provided]" if _loads_only(descriptor) else ""
                lines.append(wrap_hanging(f"  {word:<17}  {key_of(descriptor):<18}  ", f"{descriptor.summary}{note}"))
    if not plugin.descriptors and not plugin.faults:
        lines.append("  contributes nothing yet")
    lines += [wrap_hanging("  FAULT: ", fault) for fault in plugin.faults]
    return "\n".join(lines)


def _loads_only(descriptor: object) -> bool:
    return isinstance(descriptor, Algorithm) and descriptor.module is None
