"""What decoding asks of verifier, draft and prompts before it begins."""

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
    """Return the ids that end a verifier's answers, as its ``generation_config`` gives them."""
    stop = getattr(verifier.generation_config, "eos_token_id", None)
    if stop is None:
        return []
    return list(stop) if isinstance(stop, list) else [int(stop)]


def context_length(verifier: PreTrainedModel) -> int:
    """Return how many tokens a verifier's context takes."""
    return getattr(verifier.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_fit(draft: SpeculatorModel, verifier: PreTrainedConfig) -> None:
    """Refuse a draft that was made for another vocabulary or width, or reads layers that the verifier does not have.

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
            raise UsageError(
                f"the draft was made for a verifier with a {what} of {expected:,}; that of {name} is {found:,}"
            )
    if draft.chosen_aux_layers is not None:
        check_aux_layers(draft.chosen_aux_layers, own.num_hidden_layers)


def check_served(draft: SpeculatorModel, method: str) -> None:
    """Refuse a proposal method that the draft's algorithm does not serve.

    Raises:
        UsageError: With those that it serves.
    """
    algorithm = installed().all(Algorithm).get(draft.config.speculators_model_type)
    # A network that no plugin brought along speaks for itself.
    if algorithm is not None and method not in algorithm.proposals:
        served = ", ".join(algorithm.proposals) or "none"
        raise UsageError(f"drafts of {algorithm.name} do not serve the proposal method {method!r}, but: {served}")


def check_prompts(prompts: Sequence[Tensor], context: int) -> None:
    """Refuse prompts that nothing can be said to.

    Args:
        prompts: Tokens of each, int64 [T].
        context: How many tokens the verifier's context takes.

    Raises:
        UsageError: A prompt is empty, or leaves no room in the context.
    """
    for number, prompt in enumerate(prompts, start=1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise UsageError(f"{which} is empty; it needs at least one token")
        if len(prompt) >= context:
            raise UsageError(
                f"{which} has {len(prompt):,} tokens, and the verifier's context takes {context:,}; shorten the prompt"
            )
