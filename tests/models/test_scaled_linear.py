from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from specforge.models.scaled_linear import ScaledLinear, folded, largest_share, typical_size


def scaled(inputs: int, bias: bool = False) -> ScaledLinear:
    torch.manual_seed(0)
    return ScaledLinear.of(nn.Linear(inputs, 5, bias=bias))


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=4), st.booleans())
def test_a_folded_layer_is_bitwise_equal(scale: list[float], bias: bool) -> None:
    network = nn.Sequential(scaled(3 * len(scale), bias), nn.Linear(5, 2))
    network[0].set_scale(torch.tensor(scale), keep_function=False)
    plain = nn.Sequential(nn.Linear(3 * len(scale), 5, bias=bias), nn.Linear(5, 2))
    plain.load_state_dict(folded(network.state_dict()))  # strict: there is no scale any more
    inputs = torch.randn(7, 3 * len(scale)) * 30
    assert torch.equal(plain(inputs), network(inputs))


def test_it_computes_as_if_its_inputs_were_divided() -> None:
    layer = scaled(6)
    inputs = torch.randn(7, 6)
    torch.testing.assert_close(layer(inputs), inputs @ layer.weight.T)  # divided by 1 until a scale is set
    layer.set_scale(torch.tensor([2.0, 30.0]), keep_function=False)
    divided = torch.cat([inputs[:, :3] / 2, inputs[:, 3:] / 30], dim=-1)
    torch.testing.assert_close(layer(inputs), divided @ layer.weight.T)
    layer(inputs).sum().backward()
    torch.testing.assert_close(layer.weight.grad, divided.sum(0).expand(5, 6))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_it_can_keep_its_activations() -> None:
    layer = scaled(6, bias=True)
    inputs = torch.randn(7, 6)
    before = layer(inputs)
    layer.set_scale(torch.tensor([20.0, 30.0]), keep_function=True)
    torch.testing.assert_close(layer(inputs), before)


def normal(tokens: int, sizes: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, len(sizes), 64, generator=generator) * torch.tensor(sizes)[:, None]


def test_the_size_of_states_is_their_standard_deviation() -> None:
    sizes = [2.5, 20.0, 300.0]
    assert typical_size(normal(512, sizes)).tolist() == pytest.approx(sizes, rel=0.02)


def test_first_tokens_and_dominant_channels_do_not_count() -> None:
    states = normal(512, [2.0])
    states[:4] *= 1000
    states[:, :, :2] *= 1000
    assert states.square().mean().sqrt() > 300
    assert typical_size(states).item() == pytest.approx(2, rel=0.05)
    assert typical_size(states.bfloat16()).dtype == torch.float32


def test_the_share_of_the_largest_channel() -> None:
    states = normal(512, [2.0, 30.0])
    assert largest_share(states).tolist() == pytest.approx([1 / 64] * 2, rel=0.5)
    states[:, 1, 5] *= 8  # 64 parts of energy against the 63 of all others
    assert largest_share(states)[1].item() == pytest.approx(0.5, rel=0.2)
    states[0] *= 1000  # a first token
    assert largest_share(states)[1].item() == pytest.approx(0.5, rel=0.2)
