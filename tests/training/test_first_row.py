from __future__ import annotations

import torch

from specforge.training.feature_scale import read_of_first_row


def batch(loss_mask: list[int], document_ids: list[int]) -> dict[str, torch.Tensor]:
    first = torch.tensor([loss_mask]).bool(), torch.tensor([document_ids])
    others = torch.ones_like(first[0]), torch.zeros_like(first[1])
    return {name: torch.cat(pair) for name, *pair in zip(("loss_mask", "document_ids"), first, others, strict=True)}


def test_states_before_supervised_tokens_are_read() -> None:
    # The state of a document's last supervised token, and those after it, need not be stored.
    mask, documents = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 2, 2, -1]
    assert read_of_first_row(batch(mask, documents)).tolist() == [1, 1, 0, 0, 1, 0, 0, 1, 0, 0]


def test_a_row_with_only_its_first_tokens_supervised_is_read_completely() -> None:
    assert read_of_first_row(batch([1, 0, 0, 0], [0, 0, 0, -1])).tolist() == [1, 1, 1, 0]
