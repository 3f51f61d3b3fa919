"""Comparison of a running server's acceptance with the expected acceptance of its draft."""

from __future__ import annotations

from specforge.checkpoints.verification.diagnosis import Fault, cause_of_acceptance
from specforge.checkpoints.verification.probe import Served
from specforge.engines.counters import Measured


def endpoint_faults(measured: Measured, expected: Served) -> list[Fault]:
    """Compare a server's acceptance with the expected one.

    Other dtypes and kernels change single tokens of a text, so the figures are only approximately equal.
    """
    wanted = expected.expected(measured.chain)
    if abs(measured.acceptance_length - wanted) <= max(0.05, 0.15 * (wanted - 1)):
        return []
    what = f"the server accepts {measured.acceptance_length:.3f} tokens per verifier pass, {wanted:.3f} are expected"
    if measured.acceptance_length > wanted:
        return [Fault(what, "it serves another draft or verifier, or it accepts tokens that the verifier would reject")]
    return [Fault(what, cause_of_acceptance(measured.accept_rates, expected.accept_rates))]
