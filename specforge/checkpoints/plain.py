"""What formats with a plain decoder's configuration have in common: old names of fields, and rules of their readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specforge.checkpoints.verifier_facts import VerifierFacts

# What a causal language model's configuration says beside its layers.
NOT_OF_THE_LAYERS = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")


def with_old_rope(layers: dict[str, Any]) -> dict[str, Any]:
    """Say the rotary positions under the old names as well.

    A reader with transformers before version 5 looks for ``rope_theta`` and ``rope_scaling``, and computes with
    other positions, silently, where they are missing.

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
    """Yield what a draft's decoder layers say of lengths and positions otherwise than they should.

    Args:
        layers: Configuration of the decoder layers.
        verifier: The verifier; None where it is not known.
    """
    rope = layers.get("rope_parameters")
    if rope and "rope_theta" in layers and "rope_theta" in rope and layers["rope_theta"] != rope["rope_theta"]:
        yield (
            f"rope_theta is {layers['rope_theta']} and rope_parameters.rope_theta {rope['rope_theta']}: readers "
            "take one or the other, by the version of transformers"
        )
    if not rope and "rope_theta" not in layers:
        yield "the rotary positions are not said: readers take their own defaults, a base of 10000 and no scaling"
    if layers.get("tie_word_embeddings"):
        yield "tie_word_embeddings is true: a reader would take the draft's embeddings for its head"
    if verifier is None:
        return
    if layers.get("vocab_size") != verifier.vocab_size:
        yield f"vocab_size is {layers.get('vocab_size')}, but the verifier has {verifier.vocab_size} tokens"
    longest = verifier.max_position_embeddings
    if longest is not None and layers.get("max_position_embeddings") != longest:
        yield (
            f"max_position_embeddings is {layers.get('max_position_embeddings')}, but the verifier's is "
            f"{longest}: behind the shorter one, engines that do not raise it stop accepting"
        )


def width_faults(width: int | None, verifier: VerifierFacts | None) -> Iterator[str]:
    """Yield the fault of a draft that is made for states of another width than the verifier's."""
    if verifier is not None and width != verifier.hidden_size:
        yield f"the draft reads states of width {width}, but the verifier's have {verifier.hidden_size}"
