from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.models.masked_attention import masked_attention


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def visible() -> Tensor:
    mask = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    tensors = inputs(dtype)
    mine = masked_attention(*tensors, visible, 0.3)
    reference = F.scaled_dot_product_attention(*tensors, attn_mask=visible(), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(mine, reference)
    upstream = torch.randn_like(reference)
    gradients = (torch.autograd.grad(output, tensors, upstream) for output in (mine, reference))
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact)


def test_under_autocast_it_computes_in_the_short_dtype() -> None:
    query, key, value = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = masked_attention(query, key, value.bfloat16(), visible, 0.3)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), masked_attention(query, key, value, visible, 0.3), rtol=2e-2, atol=2e-2)


def test_no_mask_is_kept() -> None:
    """Tensors kept for the backward pass have the sizes of queries and keys, not of their product."""
    kept: list[Tensor] = []
    query, key, value = (torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(3))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_attention(query, key, value, lambda: torch.ones(1, 1, 300, 300, dtype=torch.bool).tril(), 1.0)
    assert kept and max(tensor.numel() for tensor in kept) == query.numel()
