"""Names of a model's tensors in checkpoint files: transformers renames some of them on reading."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map a model's tensor names to the names in files; tensors that are merged or split on reading are left out.

    Args:
        model: The model, possibly on the meta device.
        stored: All names in the files.
    """
    own = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    found = {}
    for name in stored:
        for rules in (renamings, []):
            renamed, _ = rename_source_key(name, rules, [], model.base_model_prefix, own)
            if renamed in own:
                found[renamed] = name
                break
    return found
