from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from specforge.estimation.shapes import MORE_FORMULAS, ShapeMode, ShapeTensor


def network_step(rows: int, width: int, choose: Tensor) -> Tensor:
    """Run a small network on some of its rows, forward and backward, and return its result."""
    layer = nn.Linear(width, 2 * width)
    states = torch.randn(rows, width)
    out = layer(states[choose])
    out.square().mean().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad @ out.detach().sum(0)[:width]


class TestOperations:
    @given(rows=st.integers(1, 9), width=st.integers(1, 9), data=st.data())
    def test_equal_those_of_real_tensors(self, rows, width, data):
        choose = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        with FlopCounterMode(display=False) as real:
            expected = network_step(rows, width, choose)
        with ShapeMode() as shapes:
            result = network_step(rows, width, choose)
        assert isinstance(result, ShapeTensor)
        assert result.shape == expected.shape
        assert shapes.flops[""] == real.get_total_flops()

    def test_of_attention_follow_the_formulas_for_other_devices(self):
        def attend() -> None:
            query = torch.randn(2, 4, 8, 16, requires_grad=True)
            key, value = torch.randn(2, 2, 2, 8, 16).unbind()
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()

        with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as real:
            attend()
        with ShapeMode() as shapes:
            attend()
        product = 2 * 2 * 4 * 8 * 8 * 16
        assert shapes.flops[""] == real.get_total_flops() == (2 + 5) * product

    def test_are_counted_by_part(self):
        with ShapeMode() as shapes, shapes.part("outer"):
            torch.randn(2, 3) @ torch.randn(3, 5)
            with shapes.part("inner"):
                torch.randn(1, 3) @ torch.randn(3, 1)
            torch.randn(2, 1) @ torch.randn(1, 1)
        assert shapes.flops == {"outer": 60 + 4, "inner": 6}


class TestBytes:
    def test_follow_storages(self):
        with ShapeMode() as shapes:
            tensor = torch.zeros(10, 10)
            view = tensor[2:5].t()
            assert shapes.live == 400
            tensor = tensor.double()
            assert shapes.live == 1200, "the view keeps the first storage alive"
            del view
            assert (shapes.live, shapes.peak) == (800, 1200)
            shapes.restart()
            tensor.add_(1)
            assert (shapes.live, shapes.peak) == (800, 800), "in place, nothing is allocated"

    def test_no_values_are_stored(self):
        with ShapeMode():
            huge = torch.zeros(2**40)
            assert (huge + 1).shape == (2**40,)


class TestValues:
    def test_ids_and_masks_have_values(self):
        with ShapeMode():
            ids = torch.tensor([3, 1, 2])
            assert ids.argsort().tolist() == [1, 2, 0]
            assert torch.randn(4)[torch.tensor([True, False, True, True])].shape == (3,)
            assert torch.nn.functional.embedding(ids, torch.randn(4, 5)).shape == (3, 5)

    def test_floats_have_none(self):
        with ShapeMode(), pytest.raises(RuntimeError, match="without values"):
            torch.zeros(3).sum().item()

    def test_nothing_is_computed_outside(self):
        with ShapeMode():
            tensor = torch.zeros(3)
        with pytest.raises(RuntimeError, match="outside"):
            tensor + 1

    def test_autocast_works(self):
        with ShapeMode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert (torch.zeros(2, 3) @ torch.zeros(3, 2)).dtype == torch.bfloat16
