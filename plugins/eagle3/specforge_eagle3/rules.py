"""Rules common to all readers of EAGLE-3 drafts: which tensors belong together, and which layer ids are valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.errors import UsageError
from specforge.models.vocabulary import token_map_faults
from specforge.verifier.features import check_aux_layers

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
EMBEDDINGS = "embed_tokens.weight"


def tensor_faults(tensors: Mapping[str, Tensor], draft_size: int | None, verifier_size: int | None) -> Iterator[str]:
    """Yield faults of the maps between the vocabularies, and tensors that do not belong to a draft.

    Args:
        tensors: All tensors by name.
        draft_size: Size D of the draft vocabulary in ``config.json``.
        verifier_size: Size V of the verifier's vocabulary.
    """
    for name in tensors:
        if name.startswith("verifier_"):
            yield f"the file holds {name}, which is the verifier's: vLLM refuses it, and others ignore it"
    yield from token_map_faults(tensors, draft_size, verifier_size)


def layer_id_faults(ids: Sequence[int], verifier: VerifierFacts | None) -> Iterator[str]:
    """Yield faults in the ids of the layers whose inputs are the features."""
    number = verifier.num_hidden_layers if verifier is not None else max(ids, default=0)
    try:
        check_aux_layers(ids, number)
    except UsageError as error:
        yield str(error)
