"""Faults of an export, and their likeliest causes by symptom."""

from __future__ import annotations

from dataclasses import dataclass

# Parts of a setting's name, and the effect of a wrong value.
SETTINGS = {
    "layer_ids": "the draft reads other layers than in training (engines number a layer's input or its output): "
    "acceptance is low at every position",
    "normalized": "states are scaled but were not in training, or the reverse: acceptance is low at every position",
    "norm": "states are normalised but were not in training, or the reverse: acceptance is low, lower at later "
    "positions",
    "rope": "rotary embeddings differ from training: acceptance falls as texts grow",
    "max_position": "acceptance collapses beyond this length",
    "bias": "a bias is missing or added: acceptance is low at every position",
    "vocab": "draft ids are mapped to the wrong tokens: nothing is accepted",
    "tie": "heads or embeddings are shared but were not in training",
}
OTHER = "the file belongs to another network"
READING = "an engine that does not stop here initialises missing tensors at random and drops unknown ones"
TENSORS = "the tensors are not the exported ones: damaged, cast, or of another draft"
COMPUTED = "settings and tensors are as exported, but the network's output differs: another version of a library"
FILES = "the file was truncated or changed after the export"
VERIFIER = "a draft works only with the verifier that it was trained for, not even with a fine-tuned one"
WITH_VERIFIER = "the verifier or its features differ from training: another revision, dtype or layer"


@dataclass(frozen=True)
class Fault:
    """A fault of an export.

    Attributes:
        what: What is wrong.
        cause: The likeliest cause, or the effect.
    """

    what: str
    cause: str


def cause_of_setting(name: str) -> str:
    """Return the effect of a wrong value of a setting.

    Args:
        name: The setting, such as ``"layers.rope_theta"``.
    """
    return next((cause for part, cause in SETTINGS.items() if part in name), OTHER)


def cause_of_acceptance(rates: list[float], expected: list[float]) -> str:
    """Return why a server may accept less than expected.

    Args:
        rates: Share of the rounds that accept at least k = 1, 2, ... tokens; empty if the server does not report it.
        expected: The expected shares.
    """
    first = rates[0] if rates else None
    if first is not None and first < 0.02:
        return (
            "nothing is accepted: d2t is missing or absolute, the decoder layer is randomly initialised (tensor "
            "names), or the draft belongs to another verifier"
        )
    if first is not None and first >= 0.9 * expected[0]:
        return "the first token is as good as expected, later ones are not: the state fed back (norms), or positions"
    return (
        "the draft's inputs differ from training: layer ids off by one, states before and after the final norm mixed "
        "up, a missing bias; or another template, revision or quantisation of the verifier"
    )
