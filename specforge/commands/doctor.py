"""``specforge doctor``: check that this machine and environment can run the other commands."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from packaging.requirements import Requirement

from specforge.commands.endpoints import add_endpoint_flags, check_endpoint_flags, chosen_transport, endpoint_settings
from specforge.commands.trainer import quieten
from specforge.commands.units import in_units
from specforge.commands.wrapping import HelpFormatter, wrap_hanging
from specforge.errors import SpecforgeError, UsageError
from specforge.registry import installed

if TYPE_CHECKING:
    from specforge.data.features.transports import Transport
    from specforge.training.module import DraftModule

DESCRIPTION = """\
Check versions, devices, memory, disk, the hub and plugins, and print what is wrong. Nothing is loaded or written; the
hub gets a few seconds to answer. The exit status is 1 if there is a fault.

  specforge doctor
  specforge doctor --endpoint http://localhost:8000/v1 --config FILE --compare

With --endpoint, only servers that extract states for prepare features are checked: each gets one row, twice. With the
flags of specforge fit, the states must be those that this configuration needs; with --compare, the verifier is loaded
and they must equal its own."""
DISTRIBUTION = "specforge-lightning"
HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        what: Name of the checked thing.
        state: Its state.
        fix: How to fix a fault; None if there is none.
    """

    what: str
    state: str
    fix: str | None = None


def run(arguments: list[str]) -> int:
    """Print the findings, section by section."""
    try:
        found, words = command_line().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from None
    check_endpoint_flags(found)
    if found.endpoint:
        return _check_endpoints(found, words)
    if words or found.compare:
        raise UsageError(f"{' '.join(words) or '--compare'}: needs --endpoint URL")
    machine = f"{platform.system()} {platform.machine()}"
    print(f"specforge {version(DISTRIBUTION)}, Python {platform.python_version()}, {machine}")
    faults = 0
    for look in SECTIONS:
        print(f"\n{look.__name__}")
        faults += _print(look())
    if faults:
        print(f"\n{faults} fault(s). Fix them, then run again: specforge doctor")
        return 1
    print("\nNothing is wrong. To train a first draft:\n  specforge fit --config configs/quickstart.yaml")
    return 0


def _check_endpoints(found: argparse.Namespace, words: list[str]) -> int:
    """Print what is wrong with servers."""
    from specforge.commands.configured import module_and_data

    quieten()
    if found.compare and not words:
        raise UsageError("--compare: needs the verifier of a configuration; give --config FILE")
    module, data = module_and_data(words) if words else (None, None)
    if faults := _print(endpoints(found, module, chosen_transport(found.transport, data))):
        print(f"\n{faults} fault(s). Fix them, then run again: specforge doctor --endpoint URL")
        return 1
    transport = [] if found.transport is None else ["--transport", found.transport]
    command = shlex.join(["prepare", "features", *words, "--output", "features", "--endpoint", "URL", *transport])
    print(f"\nNothing is wrong. To store states:\n  specforge {command}")
    return 0


def _print(findings: Iterator[Finding]) -> int:
    """Print findings; return the number of faults."""
    faults = 0
    for finding in findings:
        print(wrap_hanging(f"  {finding.what:<18} ", finding.state))
        if finding.fix is not None:
            print(wrap_hanging("  FAULT: ", finding.fix))
            faults += 1
    return faults


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments, without the settings of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="specforge doctor",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_endpoint_flags(parser)
    parser.add_argument("--compare", action="store_true", help="Compare served states with those of the verifier.")
    return parser


def endpoints(found: argparse.Namespace, module: DraftModule | None, transport: Transport) -> Iterator[Finding]:
    """Ask each endpoint for the states of one row."""
    # The client takes a second to import.
    from specforge.commands.endpoint_check import ask_row, compare, require_layers, wrong_layers
    from specforge.engines.connection import Address

    for url in found.endpoint:
        settings = replace(endpoint_settings(found, 1), urls=[url], retries=1)
        state = "answers with no states"
        try:
            model, states = ask_row(settings, transport)
            _, layers, width = states.states.shape
            kind = str(states.states.dtype).removeprefix("torch.")
            state = f"serves {model}: states of {layers} layers, width {width:,}, {kind}"
            fault = None
            if module is not None:
                require_layers(states, module)
            if module is not None and found.compare:
                compared = compare(states, module)
                fault = wrong_layers(compared)
                state += f", within {max(one.error for one in compared):.2%} of our own capture"
        except SpecforgeError as error:
            fault = str(error)
        yield Finding(Address.of(url).url, state, fault)


def packages() -> Iterator[Finding]:
    """Compare the installed packages with specforge's requirements."""
    required = map(Requirement, requires(DISTRIBUTION) or [])
    for one in sorted((one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})), key=str):
        try:
            found = version(one.name)
        except PackageNotFoundError:
            yield Finding(one.name, "not installed", f"pip install '{one}'")
            continue
        fits = one.specifier.contains(found, prereleases=True)
        yield Finding(one.name, f"{found:<12} {one.specifier}", None if fits else f"pip install '{one}'")


def devices() -> Iterator[Finding]:
    """List the CPU and every accelerator, with memory."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cpu", f"{os.cpu_count()} cores, {in_units(memory, 'B')} of memory")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield Finding("accelerator", f"none that torch {torch.__version__} can use; training runs on the CPU")
    elif accelerator.type == "mps":
        yield Finding("mps", "shares the CPU's memory")
    else:
        for number in range(torch.accelerator.device_count()):
            name = torch.get_device_module(accelerator).get_device_name(number)
            free, total = torch.accelerator.get_memory_info(number)
            sizes = f"{in_units(free, 'B')} of {in_units(total, 'B')} free"
            yield Finding(f"{accelerator.type}:{number}", f"{name}, {sizes}")


def disk() -> Iterator[Finding]:
    """Measure the free disk space for runs and caches."""
    from specforge.data.module import default_cache

    for what, folder in (("working directory", Path.cwd()), ("caches", default_cache())):
        there = next(one for one in (folder, *folder.parents) if one.exists())
        free = in_units(shutil.disk_usage(there).free, "B")
        fix = f"{there} is not writable; use another folder, or change its permissions"
        yield Finding(what, f"{folder}: {free} free", None if os.access(there, os.W_OK) else fix)


def hub() -> Iterator[Finding]:
    """Try to reach the hub; failure is not a fault, since runs on local folders do not need it."""
    endpoint = HfApi().endpoint
    try:
        get_session().head(endpoint, timeout=HUB_SECONDS)
        state = "reachable"
    except OfflineModeIsEnabled:
        state = "not tried, since HF_HUB_OFFLINE is set; verifiers and data must be local or in the hub's cache"
    except Exception as error:  # names, proxies, certificates and networks fail in different ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        state = f"not reachable ({reason}); verifiers and data must be local or in the hub's cache"
    yield Finding(endpoint, state)
    yield Finding("login", "a token is stored" if get_token() else "none; gated models need: hf auth login")


def plugins() -> Iterator[Finding]:
    """List every plugin with its faults."""
    for plugin in installed().plugins:
        yield Finding(
            plugin.name,
            f"{plugin.package} {plugin.version}, contributes {len(plugin.descriptors)}",
            "; ".join(plugin.faults) or None,
        )


SECTIONS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, devices, disk, hub, plugins)
