"""What a pass of a draft costs, relative to a pass of its verifier.

A pass over a few tokens is limited by memory: it takes the time in which the device reads the weights. So the ratio of
two passes is about that of the bytes that they read.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from specforge.models.speculator import SpeculatorModel


def draft_cost(draft: SpeculatorModel, verifier: PreTrainedModel) -> float | None:
    """Return the bytes that a pass of the draft reads, relative to a pass of the verifier, both as loaded.

    Args:
        draft: The draft, attached.
        verifier: Its verifier.

    Returns:
        The ratio; None if the verifier has experts, since how many of them a pass reads depends on the tokens.
    """
    if getattr(verifier.config.get_text_config(), "num_experts_per_tok", None):
        return None
    heads = draft.head_weights
    return bytes_read(draft, *(heads if isinstance(heads, list) else [heads])) / bytes_read(verifier)


def bytes_read(model: nn.Module, *further: Tensor) -> int:
    """Return the bytes of the weights that a pass reads: all but embedding tables, of which it reads single rows.

    Args:
        model: The model.
        *further: Weights outside it, such as a verifier's head.
    """
    layers = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    weights = [*(one for layer in layers for one in layer.parameters(recurse=False)), *further]
    return sum({one.data_ptr(): one.nbytes for one in weights}.values())
