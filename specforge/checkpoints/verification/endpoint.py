"""How a running server accepts, beside what is expected of the draft that it serves."""

from __future__ import annotations

from specforge.checkpoints.verification.causes import cause_of_acceptance
from specforge.checkpoints.verification.faults import Fault
from specforge.checkpoints.verification.probe import Served
from specforge.engines.counters import Measured


def endpoint_faults(measured: Measured, expected: Served) -> list[Fault]:
    """Compare what a server does with what is expected of it.

    Numbers of other types and kernels turn single tokens of a text, so that the figures are not quite equal.
    """
    wanted = expected.expected(measured.chain)
    if abs(measured.acceptance_length - wanted) <= max(0.05, 0.15 * (wanted - 1)):
        return []
    what = f"the server accepts {measured.acceptance_length:.3f} tokens a pass, and {wanted:.3f} are expected"
    if measured.acceptance_length > wanted:
        return [
            Fault(what, "it does not serve this draft, or this verifier, or it accepts what the verifier would not")
        ]
    return [Fault(what, cause_of_acceptance(measured.accept_rates, expected.accept_rates))]
