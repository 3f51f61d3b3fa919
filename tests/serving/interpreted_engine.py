"""Runs ``engine.py`` with Triton's interpreter as the CPU's backend: ``python interpreted_engine.py REQUEST ANSWER``.

vLLM drafts with DSpark and DFlash2 only in its second model runner, whose kernels are written in Triton. Its CPU build
finds no Triton backend for the CPU, as no package of one is published, and falls back to the first runner. The
interpreter computes the same kernels in numpy, slowly.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Triton reads it when it is imported.
os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import numpy as np
import torch
from torch import Tensor
from triton import language
from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def register_backend() -> None:
    """Tell vLLM that Triton runs on the CPU; it looks when it is imported."""
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def mend_interpreter() -> None:
    """Keep a comparison a boolean when it is broadcast; Triton 3.9 makes it a number, and then refuses it as a mask."""
    broadcast = InterpreterBuilder.create_splat

    def create_splat(self: Any, kind: Any, scalar: Any) -> Any:
        if scalar.data.dtype != np.bool_:
            return broadcast(self, kind, scalar)
        return TensorHandle(np.full(kind.shape, scalar.data), language.int1)

    InterpreterBuilder.create_splat = create_splat


def mend_context_keys() -> None:
    """Normalise each layer's keys of the context by its own weights.

    The CPU build's kernel takes the first layer's for all (``test_cpu_kernel.py``), so that it serves DFlash right only
    with one layer.
    """
    from vllm import _custom_ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalize(self: Any, keys: Tensor) -> Tensor:
        normalized = torch.empty_like(keys)
        for layer, weight in enumerate(self._k_norm_weights):
            _custom_ops.rms_norm(normalized[layer], keys[layer], weight, self._rms_norm_eps)
        return normalized

    DFlashQwen3Model._normalize_context_k = normalize


if __name__ == "__main__":
    register_backend()
    mend_interpreter()
    mend_context_keys()
    from engine import run

    run(Path(sys.argv[1]), Path(sys.argv[2]))
