"""The flags of ``specforge evaluate`` that name serving engines and their load."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from specforge.errors import UsageError

CONCURRENCY = [1, 8, 64]


def add_server_flags(parser: ArgumentParser) -> None:
    """Add the flags that name servers and their load."""
    parser.add_argument(
        "--endpoint",
        type=str,
        nargs="+",
        default=[],
        metavar="URL",
        help="Servers to measure, with a draft: several may draft different numbers of tokens. Without DRAFT, nothing "
        "is measured in process.",
    )
    parser.add_argument(
        "--baseline", type=str | None, default=None, metavar="URL", help="The same server without speculation."
    )
    parser.add_argument(
        "--concurrency",
        type=PositiveInt,
        nargs="+",
        default=CONCURRENCY,
        metavar="N",
        help="Numbers of requests that a server gets at a time.",
    )
    parser.add_argument(
        "--model", type=str | None, default=None, metavar="NAME", help="The servers' name for the model."
    )
    parser.add_argument(
        "--timeout", type=PositiveFloat, default=600.0, metavar="SECONDS", help="Maximum time for a server's response."
    )


def check_server_flags(found: Namespace) -> None:
    """Check that the flags of servers fit together.

    Raises:
        UsageError: They do not.
    """
    if found.endpoint:
        return
    if found.baseline is not None:
        raise UsageError(
            "--baseline is a server without speculation, beside which those of --endpoint are measured; methods "
            "without a draft are --baselines"
        )
    for flag, is_set in (("--concurrency", found.concurrency != CONCURRENCY), ("--model", found.model is not None)):
        if is_set:
            raise UsageError(f"{flag} is for servers; name them with --endpoint")
