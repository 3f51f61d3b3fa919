"""All depths in one pass compute what one pass a depth computes, with the same gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.models.chain.alignment import align, step_tokens
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows
from specforge_eagle3.model import FIRST_POSITION, Eagle3DraftModel
from specforge_peagle.dropping import keep_some
from specforge_peagle.model import PEagleDraftModel

DEPTHS, MASK = 4, 5
LENGTHS, PADDING = (9, 2, 14), 3


def depth_by_depth(draft: PEagleDraftModel, input_ids: Tensor, aux: Tensor, positions: Tensor, rows: DraftRows) -> Any:
    """Run each depth by a pass of its own, as EAGLE-3 runs a step."""
    attention = TrainingTimeTest(rows)
    tokens = step_tokens(input_ids, 1).flatten(1)[:, rows.order]
    feature = draft.fuse(aux).flatten(0, 1)[None, rows.order]
    positions = positions.flatten()[None, rows.order] + FIRST_POSITION
    states = []
    for depth, count in enumerate(rows.counts):
        if depth:
            tokens = torch.full_like(tokens[:, :count], MASK)
            feature = draft.mask_feature().expand(1, count, -1)
        own = positions[:, : tokens.shape[1]] + depth
        states.append(Eagle3DraftModel.advance(draft, tokens, feature, own, attention.at(depth), count))
    return draft.norm(torch.cat(states, dim=1)[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_one_pass_computes_what_a_pass_a_depth_does(
    share: float, num_layers: int, window: int | None, tiny_verifiers: Mapping[str, Any]
) -> None:
    torch.manual_seed(0)
    made = tiny_verifiers["llama"]
    draft = PEagleDraftModel.from_training_args(made.model.config, mask_token_id=MASK, num_layers=num_layers)
    draft.attach_verifier(made.folder, "train_only")
    draft = draft.double()
    if window is not None:
        layers = draft.config.transformer_layer_config
        layers.layer_types, layers.sliding_window = ["sliding_attention"] * num_layers, window
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) + (parameter.ndim == 1))
    torch.manual_seed(0)
    documents = torch.tensor([*torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)), *[-1] * PADDING])
    documents = documents[None]
    positions = torch.cat([*map(torch.arange, LENGTHS), torch.zeros(PADDING, dtype=torch.int64)])[None]
    input_ids = torch.randint(6, 61, documents.shape)
    aux = torch.randn(*documents.shape, 3, 16, dtype=torch.float64, requires_grad=True)
    supervised = align(torch.rand(documents.shape) < share, documents, DEPTHS).supervised
    kept = keep_some(supervised, documents, 0.7, 0.2, seed=1).flatten(1)
    rows = DraftRows.needed(kept, DocumentLayout.of(documents))
    assert rows.counts[-1] < rows.counts[0] or not share

    expected = depth_by_depth(draft, input_ids, aux, positions, rows)
    found = draft.chain(input_ids, aux, positions, rows)
    torch.testing.assert_close(found, expected)
    weights, leaves = torch.randn_like(expected), [aux, *draft.parameters()]
    gradients = (
        torch.autograd.grad((one * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for one in (found, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
