"""DFlash2's grouped dynamic causal convolution along the slots of a block.

Letters in shapes: P slots of all blocks, taps k, H width, G groups of neighbouring features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BlockConvolution(nn.Module):
    """Two convolutions around a sublayer, whose kernels are a learnt one plus what the sublayer's input adds to it.

    Tap j reads j slots back; what is before a block's first slot counts as zero.

    Args:
        width: Width H.
        taps: Slots that are read.
        group: Neighbouring features that share what is added.
    """

    def __init__(self, width: int, taps: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * (width // group), bias=False)

    def reset_parameters(self) -> None:
        """Begin as the identity."""
        with torch.no_grad():
            self.base_kernel.zero_()
            self.base_kernel[:, 0] = 1
            self.kernel_projection.weight.zero_()

    def added_kernels(self, states: Tensor) -> Tensor:
        """Return what inputs of the sublayer [P, H] add to the kernels before and after it, [2, P, taps, G]."""
        sides, taps, _ = self.base_kernel.shape
        return self.kernel_projection(states).unflatten(-1, (sides, taps, -1)).movedim(-3, 0)

    def forward(self, states: Tensor, slots: Tensor, added: Tensor, side: int) -> Tensor:
        """Convolve.

        Args:
            states: Slots of blocks, each block from its first slot without a gap, [P, H].
            slots: Number of each slot within its block, int64 [P].
            added: What is added to the kernels of one side, [P, taps, G].
            side: 0 before the sublayer, 1 after it.
        """
        mixed = torch.zeros_like(states)
        for tap, base in enumerate(self.base_kernel[side]):
            kernel = base + added[:, tap].repeat_interleave(self.group, dim=-1)
            reached = states.roll(tap, 0) * (slots >= tap)[:, None]
            mixed = mixed + reached * kernel
        return mixed
