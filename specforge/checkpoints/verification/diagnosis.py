"""The likeliest causes of a draft that is not what it was, or does not do what it did, by symptom."""

from __future__ import annotations

# Parts of a setting's name, and what a wrong value does.
SETTINGS = {
    "layer_ids": "the draft reads other layers than it was trained on (engines count from before or after a layer): "
    "acceptance is low at every position",
    "normalized": "states are scaled where they were not, or the other way round: acceptance is low at every position",
    "norm": "states are normalised where they were not, or the other way round: acceptance is low, lower at later "
    "positions",
    "rope": "positions are turned otherwise than in training: acceptance falls as texts grow",
    "max_position": "acceptance collapses behind this length",
    "bias": "a bias is left out or made up: acceptance is low at every position",
    "vocab": "draft ids are taken for others: nothing is accepted",
    "tie": "heads or embeddings are shared where they were not",
}
OTHER = "the file belongs to another network"
READING = "an engine that does not stop here leaves what is missing at random, and drops what it does not know"
TENSORS = "the tensors are not those that were written: damaged, cast, or of another draft"
COMPUTED = "all settings and tensors are as written, but the network computes otherwise: another version of a library"
FILES = "the file was cut or changed on its way"
VERIFIER = "a draft serves the verifier that it was trained for, and no other one, a fine-tuned one included"
BESIDE = "the verifier, or its features, are not those of training: another revision, dtype or layer"


def cause_of_setting(name: str) -> str:
    """Return what a wrong value of a setting does.

    Args:
        name: The setting, such as ``"layers.rope_theta"``.
    """
    return next((cause for part, cause in SETTINGS.items() if part in name), OTHER)


def cause_of_acceptance(rates: list[float], expected: list[float]) -> str:
    """Return why a server may accept otherwise than is expected.

    Args:
        rates: Share of the rounds that accept at least k = 1, 2, ... tokens; empty where the server does not tell.
        expected: The same as expected.
    """
    first = rates[0] if rates else None
    if first is not None and first < 0.02:
        return (
            "nothing is accepted: d2t is missing or absolute, the decoder layer was left at random (tensor "
            "names), or the draft belongs to another verifier"
        )
    if first is not None and first >= 0.9 * expected[0]:
        return "the first token is as good as expected, later ones are not: the state fed back (norms), or positions"
    return (
        "the draft reads what it was not trained on: layer ids off by one, states before or after the final norm mixed "
        "up, a bias left out; or another template, revision or quantisation of the verifier"
    )
