"""Block attention equals attention with an explicit mask over all slots and rows."""

from __future__ import annotations

import pytest
import torch
from flash_reference import flash_attention, flash_attention_backward
from torch import Tensor

from specforge import flash
from specforge.documents import DocumentLayout
from specforge.models.block import attention
from specforge.models.block.attention import CachedContext, PackedBlocks
from specforge.models.block.documents import document_starts
from specforge.models.block.slots import BlockSlots
from specforge.models.draft_rows import DraftRows

HEADS, GROUPS, WIDTH, SIZE, SCALE = 4, 2, 8, 3, 0.4
CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 8 + [1] * 5 + [-1] * 3, [4] * 16])
ROWS = torch.tensor([0, 3, 7, 8, 12, 16, 17, 30])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def slow_reference(
    query: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], window: int | None, causal: bool
) -> Tensor:
    """Slot by slot: the visible keys, and a softmax over them."""
    starts, outputs = document_starts(DOCUMENTS).tolist(), []
    for slot in range(len(ROWS) * SIZE):
        row, first = int(ROWS[slot // SIZE]), slot // SIZE * SIZE
        seen = [other for other in range(len(DOCUMENTS.flatten())) if starts[row] <= other <= row]
        block = list(range(first, first + SIZE))
        if window is not None:
            seen = [other for other in seen if other > row - window]
            block = [other for other in block if other <= slot] if causal else block
        keys, values = (torch.cat([before[seen], inside[block]]) for before, inside in zip(context, own, strict=True))
        keys, values = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (keys, values))
        weights = (torch.einsum("hd,khd->hk", query[slot], keys) * SCALE).softmax(-1)
        outputs.append(torch.einsum("hk,khd->hd", weights, values))
    return torch.stack(outputs)


def as_on_cuda(monkeypatch: pytest.MonkeyPatch, masks: bool) -> None:
    """Attend by FlashAttention; refuse masks unless they are needed."""
    monkeypatch.setattr(flash, "takes", lambda _: True)
    monkeypatch.setattr(flash, "FLASH_ATTENTION", flash_attention)
    monkeypatch.setattr(flash, "FLASH_ATTENTION_BACKWARD", flash_attention_backward)
    if not masks:
        monkeypatch.delattr(attention, "masked_attention")


@pytest.mark.parametrize("at_once", [1, 5, 256, None])
@pytest.mark.parametrize(("window", "causal"), [(None, True), (2, True), (2, False), (9, True)])
def test_outputs_and_gradients_are_those_of_the_slow_reference(
    window: int | None, causal: bool, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks for some slots at once, or as on a CUDA device, without any."""
    monkeypatch.setattr(attention, "QUERIES_PER_MASK", at_once or 256)
    if at_once is None:
        as_on_cuda(monkeypatch, masks=window is not None and causal)
    query = random(len(ROWS) * SIZE, HEADS, WIDTH)
    context = random(32, GROUPS, WIDTH, seed=1), random(32, GROUPS, WIDTH, seed=2)
    own = random(len(query), GROUPS, WIDTH, seed=3), random(len(query), GROUPS, WIDTH, seed=4)
    some = torch.tensor([0, 1, 4, 8, 9, 10, 20, 23])
    reference = slow_reference(query, context, own, window, causal)
    for slots in (None, some):
        chosen = slice(None) if slots is None else slots
        packed = PackedBlocks(DOCUMENTS, ROWS, SIZE, slots, causal, CPU)
        found = packed.attend(query[chosen], context, own, SCALE, window)
        torch.testing.assert_close(found, reference[chosen])
        tensors, upstream = [query, *context, *own], torch.randn_like(found)
        gradients = (
            torch.autograd.grad(output, tensors, upstream, retain_graph=True) for output in (found, reference[chosen])
        )
        for gradient, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected)


def test_masks_cover_only_a_few_slots_and_their_visible_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    right = attention.masked_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, visible: object, scale: float) -> Tensor:
        seen.append(visible().shape)  # type: ignore[operator]
        return right(query, key, value, visible, scale)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "masked_attention", recorded)
    monkeypatch.setattr(attention, "QUERIES_PER_MASK", 6)
    documents = torch.arange(64).repeat_interleave(8)[None]
    rows = torch.arange(4, 512, 8)
    packed = PackedBlocks(documents, rows, SIZE, None, True, CPU)
    keys = random(512, GROUPS, WIDTH)
    own = random(len(rows) * SIZE, GROUPS, WIDTH)
    packed.attend(random(len(rows) * SIZE, HEADS, WIDTH), (keys, keys), (own, own), SCALE, None)
    assert len(seen) == 32 and max(shape[3] for shape in seen) == 5 + 8 + 2 * SIZE


@pytest.mark.parametrize(("window", "causal"), [(None, True), (2, True), (2, False)])
def test_a_cached_context_lets_blocks_see_the_same(window: int | None, causal: bool) -> None:
    """The rows of the packed batch as one sequence each, padded after their context."""
    query = random(len(ROWS) * SIZE, HEADS, WIDTH)
    context = random(32, GROUPS, WIDTH, seed=1), random(32, GROUPS, WIDTH, seed=2)
    own = random(len(query), GROUPS, WIDTH, seed=3), random(len(query), GROUPS, WIDTH, seed=4)
    starts = document_starts(DOCUMENTS)[ROWS]
    lengths = ROWS + 1 - starts
    padded = starts[:, None] + torch.arange(int(lengths.max()) + 2)
    cached = [tensor[padded.clamp(max=31)].transpose(1, 2) for tensor in context]
    found = CachedContext(lengths, causal).attend(query, (cached[0], cached[1]), own, SCALE, window)
    torch.testing.assert_close(found, slow_reference(query, context, own, window, causal))


@pytest.mark.parametrize("begin", [0, 1])
def test_slots_of_pairs_are_found_at_once_and_in_parts(begin: int) -> None:
    supervised = torch.zeros(2, 12, dtype=torch.bool)
    supervised[0, [2, 5, 6, 9, 11]] = True
    supervised[1, [5, 9]] = True
    rows = DraftRows.needed(supervised, DocumentLayout.of(torch.zeros(1, 12)))
    slots = BlockSlots.of(rows, SIZE, first=1, begin=begin)
    assert slots.rows.tolist() == [2, 5, 6, 9, 11]
    pairs = slots.wanted[slots.of_pairs]
    expected = [(int(row), step) for step, count in enumerate(rows.counts) for row in rows.order[:count]]
    assert [(int(slots.rows[pair // SIZE]), int(pair % SIZE) - 1) for pair in pairs] == expected
    assert len(slots.wanted) == len(pairs) + (0 if begin else 5)
    parts = slots.parts(2)
    assert [part.rows.tolist() for part in parts] == [[2, 5], [6, 9], [11]]
    joined = torch.cat([part.wanted + number * 2 * SIZE for number, part in enumerate(parts)])
    assert torch.equal(joined, slots.wanted)
