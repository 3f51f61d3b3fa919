"""Flags of commands that ask serving engines for states."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from specforge.hookspecs import FeatureTransport
from specforge.registry import installed

if TYPE_CHECKING:
    from specforge.data.features.transports import Transport
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
    parser.add_argument(
        "--transport", default="file", metavar="NAME", help="How the states come here; names: specforge plugins."
    )


def endpoint_settings(found: argparse.Namespace, concurrency: int) -> EndpointSettings:
    """Return how the engines are used."""
    # The client takes a second to import.
    from specforge.engines.pool import EndpointSettings

    return EndpointSettings(found.endpoint, found.model, concurrency, timeout=found.timeout, patience=found.timeout)


def transport_of(found: argparse.Namespace) -> Transport:
    """Return the transport.

    Raises:
        UsageError: No plugin provides it.
    """
    descriptor = installed().find(FeatureTransport, found.transport)
    transport: Transport = installed().load(descriptor, "transport")()
    return transport


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds
