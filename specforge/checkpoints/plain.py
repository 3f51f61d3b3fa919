"""Common parts of formats with a plain decoder's configuration: legacy field names, and rules of their readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specforge.checkpoints.verifier_facts import VerifierFacts

# Fields of a causal language model's configuration that do not describe its layers.
NON_LAYER_FIELDS = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")


def with_legacy_rope(layers: dict[str, Any]) -> dict[str, Any]:
    """Add the rotary embedding parameters under their legacy names.

    A reader with transformers before version 5 reads ``rope_theta`` and ``rope_scaling``; if they are missing, it
    silently uses other rotary embeddings.

    Args:
        layers: Configuration of decoder layers, with ``rope_parameters``.
    """
    rope = layers.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return layers
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_scaled = rope.get("rope_type", "default") != "default"
    return {**layers, "rope_theta": rope["rope_theta"], "rope_scaling": scaling if is_scaled else None}


def position_faults(layers: dict[str, Any], verifier: VerifierFacts | None) -> Iterator[str]:
    """Yield faults in the lengths and rotary embeddings of a draft's decoder layers.

    Args:
        layers: Configuration of the decoder layers.
        verifier: Facts about the verifier; None if unknown.
    """
    rope = layers.get("rope_parameters")
    if rope and "rope_theta" in layers and "rope_theta" in rope and layers["rope_theta"] != rope["rope_theta"]:
        yield (
            f"rope_theta is {layers['rope_theta']}, but rope_parameters.rope_theta is {rope['rope_theta']}: readers "
            "use one or the other, depending on the version of transformers"
        )
    if not rope and "rope_theta" not in layers:
        yield "the rotary embeddings are not set: readers use their defaults, a base of 10000 and no scaling"
    if layers.get("tie_word_embeddings"):
        yield "tie_word_embeddings is true: a reader would use the draft's embeddings as its head"
    if verifier is None:
        return
    if layers.get("vocab_size") != verifier.vocab_size:
        yield f"vocab_size is {layers.get('vocab_size')}, but the verifier has {verifier.vocab_size} tokens"
    longest = verifier.max_position_embeddings
    if longest is not None and layers.get("max_position_embeddings") != longest:
        yield (
            f"max_position_embeddings is {layers.get('max_position_embeddings')}, but the verifier's is "
            f"{longest}: beyond the shorter one, engines that do not raise it stop accepting"
        )


def width_faults(width: int | None, verifier: VerifierFacts | None) -> Iterator[str]:
    """Yield a fault if the draft reads states of a different width than the verifier's."""
    if verifier is not None and width != verifier.hidden_size:
        yield f"the draft reads states of width {width}, but the verifier's width is {verifier.hidden_size}"
