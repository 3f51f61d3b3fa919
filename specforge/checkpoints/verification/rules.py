"""Rules for a draft's files that apply to every reader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from specforge.checkpoints.layout import StoredDraft
from specforge.errors import UsageError
from specforge.models.base_components import own_rotary


def file_faults(stored: StoredDraft) -> Iterator[str]:
    """Yield tensors with values that are not finite, and dtypes that differ from ``config.json``."""
    floating = {name: one for name, one in stored.tensors.items() if one.is_floating_point()}
    for name, tensor in floating.items():
        if not bool(torch.isfinite(tensor).all()):
            yield f"{name} holds values that are not finite, such as {float(tensor[~torch.isfinite(tensor)][0])}"
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in floating.values()})
    declared = stored.config.get("dtype") or stored.config.get("torch_dtype")
    if dtypes != [declared]:
        yield (
            f"config.json has the dtype {declared!r}, but the tensors are {' and '.join(dtypes)}; export casts all of "
            "them with --dtype"
        )
    yield from rotation_faults(stored.config)


def rotation_faults(config: dict[str, Any]) -> Iterator[str]:
    """Yield rotary embedding settings that engines interpret differently than the draft's own layers.

    For every model type, vLLM's ``get_rope`` rotates the fraction ``partial_rotary_factor`` of each head, and reads
    ``mrope_section`` as three-dimensional positions; the layers of most types ignore both.

    Args:
        config: The draft's ``config.json``.
    """
    layers = config.get("transformer_layer_config", config)
    if not isinstance(layers, dict):
        return
    given = layers.get("rope_parameters") or layers.get("rope_scaling")
    rope = given.get("full_attention") or given if isinstance(given, dict) else {}
    share = rope.get("partial_rotary_factor", layers.get("partial_rotary_factor"))
    directions = [name for name in rope if name.startswith("mrope_")]
    if share in (None, 1) and not directions:
        return
    kind = layers.get("model_type")
    try:
        made = CONFIG_MAPPING[kind].from_dict({name: one for name, one in layers.items() if name != "model_type"})
        rotary = own_rotary(made)
        rotated = 2 * rotary.get_buffer("inv_freq").numel()
        width = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
    except (KeyError, UsageError, AttributeError, TypeError, ValueError) as error:
        yield f"the rotary embeddings of {kind!r} layers cannot be computed: {error}"
        return
    if share not in (None, 1) and int(width * share) != rotated:
        yield (
            f"partial_rotary_factor is {share}, but the trained {kind} layers rotate {rotated} of {width} dimensions: "
            f"engines would rotate {int(width * share)}; remove it"
        )
    if directions and not hasattr(rotary, "mrope_section"):
        yield (
            f"{' and '.join(directions)} ask for three-dimensional positions, but {kind} layers have one position per "
            "token; remove them"
        )
