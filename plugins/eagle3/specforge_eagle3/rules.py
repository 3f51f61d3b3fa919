"""Rules that every reader of an EAGLE-3 draft has: which tensors go together, and what layer ids may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.errors import UsageError
from specforge.verifier.features import check_aux_layers
from specforge_eagle3.model import Eagle3DraftModel

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
EMBEDDINGS = "embed_tokens.weight"


def without_borrowed_embeddings(draft: Eagle3DraftModel) -> dict[str, Tensor]:
    """Return a draft's tensors without token embeddings that are the attached verifier's, which readers share."""
    state = draft.state_dict()
    own = state.get(EMBEDDINGS)
    if own is not None:
        verifier = draft.verifier_parts.embed_tokens.weight
        if own.shape == verifier.shape and torch.equal(
            own.to(verifier.dtype), verifier.to(own.dtype).to(verifier.dtype)
        ):
            del state[EMBEDDINGS]
    return state


def tensor_faults(tensors: Mapping[str, Tensor], draft_size: int | None, verifier_size: int | None) -> Iterator[str]:
    """Yield what is wrong with the maps between the vocabularies, and tensors that are no draft's.

    Args:
        tensors: All tensors by name.
        draft_size: Size D of the draft vocabulary, as ``config.json`` says.
        verifier_size: Size V of the verifier's.
    """
    for name in tensors:
        if name.startswith("verifier_"):
            yield f"the file holds {name}, the verifier's own: vLLM refuses it, and others leave it out"
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if draft_size is None or verifier_size is None:
        return
    if draft_size == verifier_size:
        if d2t is not None:
            yield "d2t is there, though both vocabularies are the same; it has to be left out"
        return
    if d2t is None:
        yield (
            f"d2t is missing, though the draft has {draft_size} of {verifier_size} tokens: engines would take "
            "draft ids for the verifier's, and accept nothing"
        )
        return
    if d2t.dtype != torch.int64:
        yield f"d2t is {d2t.dtype}, not torch.int64"
    ids = d2t.long() + torch.arange(d2t.numel())
    ascending = bool((ids.diff() > 0).all())
    if not ascending or int(ids[0]) < 0 or int(ids[-1]) >= verifier_size:
        absolute = bool((d2t.diff() > 0).all()) and int(d2t.max()) < verifier_size
        hint = "; it looks like the ids themselves, but has to hold id - place" if absolute else ""
        yield f"d2t[i] + i are no ascending ids below {verifier_size}{hint}"
    if t2d is not None:
        marked = t2d.nonzero().squeeze(-1)
        if t2d.dtype != torch.bool or marked.numel() != ids.numel() or not torch.equal(marked, ids):
            yield (
                f"t2d marks {marked.numel()} tokens, and they are not the {ids.numel()} that d2t leads to; d2t "
                "must hold id - place"
            )


def layer_id_faults(ids: Sequence[int], verifier: VerifierFacts | None) -> Iterator[str]:
    """Yield what is wrong with the ids of the layers before which features are taken."""
    number = verifier.num_hidden_layers if verifier is not None else max(ids, default=0)
    try:
        check_aux_layers(ids, number)
    except UsageError as error:
        yield str(error)
