"""Checks of verifier, draft and prompts before decoding starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed
from specforge.verifier.features import check_aux_layers


def default_stop_tokens(verifier: PreTrainedModel) -> list[int]:
    """Return the ids that end a verifier's answers, from its ``generation_config``."""
    stop = getattr(verifier.generation_config, "eos_token_id", None)
    if stop is None:
        return []
    return list(stop) if isinstance(stop, list) else [int(stop)]


def context_length(verifier: PreTrainedModel) -> int:
    """Return the length of a verifier's context in tokens."""
    return getattr(verifier.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_fit(draft: SpeculatorModel, verifier: PreTrainedConfig) -> None:
    """Reject a draft that was made for another vocabulary or width, or reads layers that the verifier does not have.

    Args:
        draft: The draft.
        verifier: The verifier's configuration.

    Raises:
        UsageError: With both numbers, or the layers.
    """
    # A draft without decoder layers states its sizes itself.
    layers = getattr(draft.config, "transformer_layer_config", draft.config)
    width = getattr(draft.config, "target_hidden_size", None) or getattr(layers, "hidden_size", None)
    own = verifier.get_text_config()
    for what, expected, found in (
        ("vocabulary", getattr(layers, "vocab_size", None), own.vocab_size),
        ("width", width, own.hidden_size),
    ):
        if expected is not None and expected != found:
            name = verifier.name_or_path or verifier.model_type
            raise UsageError(f"the draft was made for a verifier with a {what} of {expected:,}; {name} has {found:,}")
    if draft.chosen_aux_layers is not None:
        check_aux_layers(draft.chosen_aux_layers, own.num_hidden_layers)


def check_served(draft: SpeculatorModel, method: str) -> None:
    """Reject a proposal method that the draft's algorithm does not support.

    Raises:
        UsageError: The message lists the supported methods.
    """
    algorithm = installed().all(Algorithm).get(draft.config.speculators_model_type)
    # A network without a plugin is not restricted.
    if algorithm is not None and method not in algorithm.proposals:
        supported = ", ".join(algorithm.proposals) or "none"
        raise UsageError(
            f"{algorithm.name} drafts do not support the proposal method {method!r}; supported: {supported}"
        )


def check_prompts(prompts: Sequence[Tensor], context: int) -> None:
    """Reject prompts that cannot be continued.

    Args:
        prompts: Tokens of each prompt, int64 [T].
        context: Length of the verifier's context in tokens.

    Raises:
        UsageError: A prompt is empty, or leaves no room in the context.
    """
    for number, prompt in enumerate(prompts, start=1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise UsageError(f"{which} is empty; it needs at least one token")
        if len(prompt) >= context:
            raise UsageError(
                f"{which} has {len(prompt):,} tokens, and the verifier's context is {context:,}; shorten the prompt"
            )
