"""``specforge plugins``: what is installed, what it contributes, and what is wrong with it."""

from __future__ import annotations

import argparse

from specforge.hookspecs import Algorithm
from specforge.registry import KINDS, Plugin, installed, key_of


def run(arguments: list[str]) -> int:
    """Print every plugin with its package, version, contributions and faults."""
    argparse.ArgumentParser(prog="specforge plugins", description=run.__doc__).parse_args(arguments)
    for plugin in installed().plugins:
        print(describe(plugin))
    return 0


def describe(plugin: Plugin) -> str:
    """Return a plugin's lines: a head line, one line a contribution, one line a fault."""
    lines = [f"{plugin.name}  ({plugin.package} {plugin.version})"]
    for word, kind in KINDS.items():
        for descriptor in plugin.descriptors:
            if isinstance(descriptor, kind):
                note = "  [loads; training is not provided]" if _loads_only(descriptor) else ""
                lines.append(f"  {word:<17}  {key_of(descriptor):<18}  {descriptor.summary}{note}")
    if not plugin.descriptors and not plugin.faults:
        lines.append("  contributes nothing yet")
    lines += [f"  FAULT: {fault}" for fault in plugin.faults]
    return "\n".join(lines)


def _loads_only(descriptor: object) -> bool:
    return isinstance(descriptor, Algorithm) and descriptor.module is None
