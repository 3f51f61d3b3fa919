from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_reference import flash_attention, flash_attention_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specforge import flash
from specforge.documents import DocumentLayout
from specforge.models.chain import kernels, ttt_attention
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows

SCALE = 0.6


@st.composite
def document_ids(draw: st.DrawFn, max_length: int = 9) -> Tensor:
    """Rows of documents and padding, the latter anywhere; at least one real token."""
    rows = []
    for number in range(draw(st.integers(1, 3))):
        segments = draw(st.lists(st.tuples(st.integers(1, max_length), st.booleans()), min_size=1, max_size=4))
        row: list[int] = []
        for document, (length, padding) in enumerate(segments):
            # The first segment of the first row is real.
            row += [-1 if padding and (number or document) else document] * length
        rows.append(row)
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def random_steps(documents: Tensor, steps: int, heads: int, kv_heads: int, seed: int, width: int = 4) -> list[Any]:
    """Return [query, key, value] of every step, float64 leaves."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = documents.shape

    def leaf(count: int) -> Tensor:
        return torch.randn(batch, count, length, width, generator=generator, dtype=torch.float64).requires_grad_()

    return [[leaf(heads), leaf(kv_heads), leaf(kv_heads)] for _ in range(steps)]


def all_rows(documents: Tensor, steps: int) -> DraftRows:
    return DraftRows.all(steps, documents.numel(), DocumentLayout.of(documents))


def ours(
    documents: Tensor, steps: list[Any], window: int | None, scale: float = SCALE, rows: DraftRows | None = None
) -> Tensor:
    """Attend at the rows that are run; zero at the others."""
    rows = rows or all_rows(documents, len(steps))
    attention = TrainingTimeTest(rows)
    outputs = []
    for step, (tensors, count) in enumerate(zip(steps, rows.counts, strict=True)):
        ordered = [tensor.transpose(1, 2).flatten(0, 1)[rows.order].transpose(0, 1)[None] for tensor in tensors]
        if step == 0:
            attention.record_others(0, *(tensor[:, :, count:] for tensor in ordered[1:]))
        output = attention.at(step).attend(0, *(tensor[:, :, :count] for tensor in ordered), scale, window)
        flat = output.new_zeros(documents.numel(), *output[0, :, 0].shape)
        flat = flat.index_copy(0, rows.order[:count], output[0].transpose(0, 1))
        outputs.append(flat.unflatten(0, documents.shape).transpose(1, 2))
    return torch.stack(outputs)


def dense(documents: Tensor, steps: list[Any], window: int | None, scale: float = SCALE) -> Tensor:
    """Attend with an explicit mask [T, (k + 1) T] at step k, head by head."""
    length = documents.shape[1]
    t = torch.arange(length)
    outputs = []
    for step, (query, _, _) in enumerate(steps):
        output = torch.zeros_like(query)
        for row in range(query.shape[0]):
            same = documents[row][:, None] == documents[row][None, :]
            first = same & (t[None, :] <= t[:, None])
            if window is not None:
                first = first & (t[None, :] > t[:, None] + step - window)
            own = [
                torch.eye(length, dtype=torch.bool) & (window is None or step - later < window)
                for later in range(1, step + 1)
            ]
            mask = torch.cat([first, *own], dim=1)
            for head in range(query.shape[1]):
                group = head * steps[0][1].shape[1] // query.shape[1]
                keys = torch.cat([key[row, group] for _, key, _ in steps[: step + 1]])
                values = torch.cat([value[row, group] for _, _, value in steps[: step + 1]])
                logits = (query[row, head] @ keys.T * scale).masked_fill(~mask, float("-inf"))
                output[row, head] = logits.softmax(-1) @ values
        outputs.append(output)
    return torch.stack(outputs)


@pytest.fixture(params=["short blocks", "formula", "sequences"], scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks shorter than the documents of a test, by either kernel, and sequences by a kernel that is for CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "QUERIES_PER_MASK", 2)
        patch.setattr(kernels, "_is_fused", lambda _: request.param == "short blocks")
        if request.param == "sequences":
            patch.setattr(ttt_attention, "kernels_for", lambda _: kernels.Sequences)
            patch.setattr(flash, "FLASH_ATTENTION", flash_attention)
            patch.setattr(flash, "FLASH_ATTENTION_BACKWARD", flash_attention_backward)
        yield


@pytest.mark.usefixtures("kernel")
@settings(max_examples=60)
@given(
    documents=document_ids(),
    steps=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    window=st.none() | st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 999),
)
def test_outputs_and_gradients_are_those_of_a_dense_mask(
    documents: Tensor, steps: int, heads: tuple[int, int], window: int | None, share: float, seed: int
) -> None:
    leaves = random_steps(documents, steps, *heads, seed)
    flat = [leaf for step in leaves for leaf in step]
    supervised = torch.rand(steps, documents.numel(), generator=torch.Generator().manual_seed(seed)) < share
    rows = DraftRows.needed(supervised, DocumentLayout.of(documents))
    run = (rows.state_index() >= 0).unflatten(1, documents.shape)
    real = ((documents >= 0) & run)[:, :, None, :, None]
    mine, reference = ours(documents, leaves, window, rows=rows), dense(documents, leaves, window)
    torch.testing.assert_close(mine, reference * real, atol=1e-6, rtol=1e-6)
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * real
    gradients = torch.autograd.grad((mine * upstream).sum(), flat, materialize_grads=True)
    expected = torch.autograd.grad((reference * upstream).sum(), flat, materialize_grads=True)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, exact, atol=1e-6, rtol=1e-6)


@given(documents=document_ids(), window=st.none() | st.integers(1, 4), seed=st.integers(0, 999))
def test_a_packed_document_equals_a_separate_one(documents: Tensor, window: int | None, seed: int) -> None:
    leaves = random_steps(documents, 3, 2, 1, seed)
    packed = ours(documents, leaves, window)
    upstream = torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row in range(documents.shape[0]):
        for number in documents[row].unique().tolist():
            if number < 0:
                continue
            # A number may recur after padding; each run is then a separate document.
            indices = (documents[row] == number).nonzero().squeeze(1)
            begin, end = int(indices[0]), int(indices[-1]) + 1
            if end - begin != indices.numel():
                continue
            part = (slice(row, row + 1), slice(None), slice(begin, end))
            own = [[leaf.detach()[part].clone().requires_grad_() for leaf in step] for step in leaves]
            separate = ours(torch.zeros(1, end - begin, dtype=torch.int64), own, window)
            torch.testing.assert_close(separate, packed[(slice(None), *part)])
            gradients = torch.autograd.grad(
                (packed[(slice(None), *part)] * upstream[(slice(None), *part)]).sum(),
                [leaf for step in leaves for leaf in step],
                retain_graph=True,
            )
            expected = torch.autograd.grad(
                (separate * upstream[(slice(None), *part)]).sum(), [leaf for step in own for leaf in step]
            )
            for gradient, exact in zip(gradients, expected, strict=True):
                torch.testing.assert_close(gradient[part], exact)
                outside = gradient.clone()
                outside[part] = 0
                assert not outside.any()


@pytest.mark.parametrize("common", [0.0, 8.0])
def test_bfloat16_stays_close(common: float) -> None:
    """Logits of later steps pass through the query's short dtype; small differences of large logits must survive."""
    documents = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 2])
    short = [[leaf.detach().bfloat16() for leaf in step] for step in random_steps(documents, 4, 4, 2, 3, width=16)]
    for query, key, _ in short:
        query[..., 0] += common
        key[..., 0] += common
    reference = dense(documents, [[leaf.double() for leaf in step] for step in short], None)
    real = (documents >= 0)[None, :, None, :, None]
    error = (ours(documents, short, None).double() - reference) * real
    assert error.abs().max() < 0.03


def test_layers_have_separate_keys() -> None:
    documents = torch.zeros(1, 5, dtype=torch.int64)
    first, second = random_steps(documents, 2, 2, 1, 1), random_steps(documents, 2, 2, 1, 2)
    attention = TrainingTimeTest(all_rows(documents, 2))
    outputs: list[list[Tensor]] = [[], []]
    for step in range(2):
        for layer, leaves in enumerate((first, second)):
            outputs[layer].append(attention.at(step).attend(layer, *leaves[step], SCALE))
    torch.testing.assert_close(torch.stack(outputs[0]), dense(documents, first, None), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.stack(outputs[1]), dense(documents, second, None), atol=1e-6, rtol=1e-6)


@given(documents=document_ids(max_length=40))
def test_every_real_token_is_in_one_group(documents: Tensor) -> None:
    layout = DocumentLayout.of(documents)
    flat = documents.flatten()
    seen = torch.cat([group[group >= 0] for group in layout.groups])
    assert seen.sort().values.equal((flat >= 0).nonzero().squeeze(1))
    for group in layout.groups:
        lengths = (group >= 0).sum(1)
        assert int(lengths.max()) == group.shape[1] <= 2 * int(lengths.min())
        for indices, length in zip(group, lengths.tolist(), strict=True):
            assert (indices[:length] == torch.arange(int(indices[0]), int(indices[0]) + length)).all()
            assert (indices[length:] == -1).all()
            assert flat[indices[:length]].unique().numel() == 1
            row = indices[:length] // documents.shape[1]
            assert row.unique().numel() == 1
            # The document is complete.
            before, after = int(indices[0]) - 1, int(indices[0]) + length
            width = documents.shape[1]
            assert after % width == 0 or flat[after] != flat[before + 1]
            assert (before + 1) % width == 0 or flat[before] != flat[before + 1]
    assert sum(group.numel() for group in layout.groups) < 2 * seen.numel()
    assert len(layout.groups) <= documents.shape[1].bit_length()


@pytest.mark.parametrize(
    ("documents", "is_whole"),
    [
        ([[0, 0, 0], [5, 5, 5]], True),
        ([[0, 0, -1], [0, 0, 0]], True),
        ([[0, 0, 1]], False),
        ([[-1, 0, 0]], False),
        ([[0, -1, 0]], False),
        ([[0, 1, 1], [-1, -1, -1]], False),
        ([[0, 0, 0], [-1, -1, -1]], False),
    ],
)
def test_whole_rows_are_recognised(documents: list[list[int]], is_whole: bool) -> None:
    assert DocumentLayout.of(torch.tensor(documents)).whole_rows is is_whole


def test_output_on_padding_is_zero_where_documents_are_gathered() -> None:
    documents = torch.tensor([[-1, 0, 0, 1, -1]])
    output = ours(documents, random_steps(documents, 2, 1, 1, 0), None)
    assert not output[:, :, :, [0, 4]].any()
    assert output[:, :, :, 1:4].all()


def test_a_batch_of_only_padding_gives_zeros() -> None:
    documents = torch.full((2, 3), -1)
    leaves = random_steps(documents, 2, 2, 1, 0)
    output = ours(documents, leaves, None)
    assert output.shape == (2, 2, 2, 3, 4) and not output.any()
