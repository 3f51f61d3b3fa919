"""Flags of commands that ask serving engines for states."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from specforge.errors import UsageError

if TYPE_CHECKING:
    from specforge.data.features.transports import Transport
    from specforge.data.module import DraftDataModule
    from specforge.engines.pool import EndpointSettings


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which engines to ask, and how the states come from them."""
    parser.add_argument(
        "--endpoint", nargs="+", default=[], metavar="URL", help="URLs of engines, such as http://localhost:8000/v1."
    )
    parser.add_argument("--model", metavar="NAME", help="The engines' name for the verifier.")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="Maximum time for an answer, and for the engines to come back when none is running.",
    )
    add_transport_flag(parser)


def check_endpoint_flags(found: argparse.Namespace) -> None:
    """Refuse options of servers when no server is named.

    Raises:
        UsageError: One is given.
    """
    for flag in ("model", "transport"):
        if not found.endpoint and getattr(found, flag) is not None:
            raise UsageError(f"--{flag}: needs --endpoint URL")


def add_transport_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says how states come from engines."""
    parser.add_argument(
        "--transport",
        metavar="NAME",
        help="How states come from servers (see specforge plugins); data.feature_transport of the configuration by "
        "default.",
    )


def chosen_transport(name: str | None, data: DraftDataModule | None) -> Transport:
    """Return the transport that a flag names, or else the configuration.

    Raises:
        UsageError: No installed plugin provides it, or it cannot be used here.
    """
    from specforge.data.features.transports import transport_named

    return transport_named(name or (data.feature_transport if data else "file"))


def endpoint_settings(found: argparse.Namespace, concurrency: int) -> EndpointSettings:
    """Return how the engines are used."""
    # The client takes a second to import.
    from specforge.engines.pool import EndpointSettings

    return EndpointSettings(found.endpoint, found.model, concurrency, timeout=found.timeout, patience=found.timeout)


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """Parse the number of a TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds
