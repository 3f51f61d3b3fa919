"""Block drafts for random verifiers whose layers matter."""

from __future__ import annotations

from typing import Any

import torch
from random_verifiers import VOCABULARY, fill
from transformers import PreTrainedModel

from specforge_dflash.dflash2 import DFlash2DraftModel
from specforge_dflash.dspark import DSparkDraftModel
from specforge_dflash.model import DFlashDraftModel

AUX_LAYERS = [0, 1, 3]
MASK = VOCABULARY - 1
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
SMALL: dict[str, Any] = {"num_layers": 2, "aux_hidden_state_layer_ids": AUX_LAYERS, "mask_token_id": MASK}
DFLASH2 = {"selector_rank": 4, "selector_top_k": 5, "conv_group_size": 4}
DSPARK = {"markov_rank": 4, "block_size": 4, "sample_from_anchor": True}
KINDS: dict[str, tuple[type[DFlashDraftModel], dict[str, Any]]] = {
    "dflash": (DFlashDraftModel, {"block_size": 5}),
    "dflash, pruned": (DFlashDraftModel, {"block_size": 5, "t2d": torch.arange(VOCABULARY) % 3 == 0}),
    "dflash, sliding": (DFlashDraftModel, {"block_size": 5, "sliding": True}),
    "dflash2": (DFlash2DraftModel, {"block_size": 5, **DFLASH2}),
    "dflash2, three taps": (DFlash2DraftModel, {"block_size": 5, **DFLASH2, "conv_kernel_size": 3}),
    "dspark": (DSparkDraftModel, DSPARK),
    "dspark, gated": (DSparkDraftModel, {**DSPARK, "markov_head_type": "gated"}),
    "dspark, rnn": (DSparkDraftModel, {**DSPARK, "markov_head_type": "rnn"}),
    "dspark, bonus anchor": (DSparkDraftModel, {**DSPARK, "block_size": 5, "sample_from_anchor": False}),
}


def random_draft(verifier: PreTrainedModel, kind: str, seed: int = 1, **options: Any) -> Any:
    """Make an untrained draft, attached to its verifier."""
    network, own = KINDS[kind]
    values = {**SMALL, **own, **options}
    sliding = values.pop("sliding", False)
    draft = network.from_training_args(verifier.config, **values)
    if sliding:
        layers = {**draft.config.to_dict()["transformer_layer_config"], **SLIDING}
        changed = {"transformer_layer_config": layers, "sliding_window_non_causal": False}
        draft = network(type(draft.config).from_dict({**draft.config.to_dict(), **changed}))
    if draft.draft_ids is not None:
        draft.t2d.copy_(values["t2d"])
        draft.d2t.copy_(values["t2d"].nonzero()[:, 0] - torch.arange(int(values["t2d"].sum())))
    fill(draft, seed)
    draft.attach_verifier(verifier)
    return draft.double()
