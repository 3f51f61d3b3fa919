"""A linear layer whose inputs are divided by constants during training; written drafts do not contain them.

The change of a layer's output in an optimizer step grows with the size of its inputs. A verifier's states may have a
root mean square of 20 to 50, while a draft's own start near 1: unscaled, their updates drown the output of the draft's
layers. ``V (x / s)`` is ``(V / s) x``: the divisors are folded into the weight when the draft is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = "input_scale"
# The median of |x| of a standard normal distribution.
MEDIAN_SIZE = 0.6745


class ScaledLinear(nn.Linear):
    """Computes ``(weight / input_scale) x + bias``; the scale, [in_features], is 1 until it is set, and not trained."""

    input_scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Return a layer with the parameters of another one, scaled by 1."""
        scaled = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scaled.weight, scaled.bias = linear.weight, linear.bias
        scaled.input_scale = nn.Buffer(linear.weight.new_ones(linear.in_features))
        return scaled

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return F.linear(input, self.weight / self.input_scale, self.bias)

    @torch.no_grad()
    def set_scale(self, scale: Tensor, keep_function: bool) -> None:
        """Divide the inputs by constants from now on.

        Args:
            scale: Constants, [in_features] or one for each of several equal blocks of inputs.
            keep_function: Whether to multiply the weight by them, so that the layer computes the same function.
        """
        self.input_scale.copy_(scale.repeat_interleave(self.in_features // scale.numel()))
        if keep_function:
            # Each process holds whole rows of a sharded weight.
            weight: Tensor = getattr(self.weight, "to_local", lambda: self.weight)()
            weight.mul_(self.input_scale)


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the divisors of scaled layers into their weights; the network's results stay bitwise the same.

    Args:
        state: Tensors by name.
    """
    found = {name: tensor for name, tensor in state.items() if not name.endswith(f".{SCALE}")}
    for name in state.keys() - found.keys():
        weight = f"{name.removesuffix(SCALE)}weight"
        found[weight] = found[weight] / state[name]
    return found


def typical_size(states: Tensor) -> Tensor:
    """Estimate the standard deviation of most channels over most tokens.

    A root mean square is dominated by the few channels with nearly all of the energy, and by first tokens; medians are
    not.

    Args:
        states: States of layers, [T, n, H].

    Returns:
        The n values, float32 [n].
    """
    by_channel = states.float().abs().median(dim=0).values
    return by_channel.median(dim=-1).values / MEDIAN_SIZE


def largest_share(states: Tensor) -> Tensor:
    """Return the largest channel's share of a layer's energy, over most tokens; 1 / H if all channels are alike.

    Args:
        states: States of layers, [T, n, H].

    Returns:
        The n values, float32 [n].
    """
    by_channel = states.float().square().median(dim=0).values
    return by_channel.amax(dim=-1) / by_channel.sum(dim=-1)
