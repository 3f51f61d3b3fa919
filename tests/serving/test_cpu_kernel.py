"""The fault of vLLM's CPU build that ``interpreted_engine.py`` mends; once this test fails, that can go."""

from __future__ import annotations

import torch
from vllm import _custom_ops
from vllm.platforms import current_platform


def test_grouped_norms_take_the_first_weights() -> None:
    """vLLM's DFlash normalises the keys of all layers in one call, with a row of weights for each."""
    current_platform.import_kernels()
    keys, weights = torch.randn(2, 5, 3, 32), torch.rand(2, 32) + 0.5
    normalized = torch.empty_like(keys)
    _custom_ops.rms_norm(normalized, keys, weights, 1e-6)
    units = torch.nn.functional.rms_norm(keys, (32,), eps=1e-6)
    torch.testing.assert_close(normalized[0], units[0] * weights[0])
    torch.testing.assert_close(normalized[1], units[1] * weights[0])
