from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from specforge.models import lean_blocks
from specforge.models.lean_blocks import LeanMLP, LeanRMSNorm, use_memory_saving_blocks

SIZES: Any = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
BLOCKS: list[Callable[[], nn.Module]] = [
    lambda: LlamaRMSNorm(16),
    lambda: MistralRMSNorm(16),
    lambda: Qwen3RMSNorm(16),
    lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
    lambda: MistralMLP(MistralConfig(**SIZES)),
    lambda: Qwen3MLP(Qwen3Config(**SIZES)),
]


def pair(build: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return a block of transformers with random weights, and a lean block with the same weights."""
    torch.manual_seed(0)
    plain = build().to(dtype)
    for weight in plain.parameters():
        nn.init.normal_(weight)
    lean = copy.deepcopy(plain)
    use_memory_saving_blocks(lean)
    assert isinstance(lean, LeanRMSNorm | LeanMLP)
    return plain, lean


def run(block: nn.Module, states: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the states and of every weight."""
    states = states.clone().requires_grad_()
    output = block(states)
    weights = list(block.parameters())
    return [output, *torch.autograd.grad(output, [states, *weights], upstream.to(output.dtype))]


@pytest.mark.parametrize("build", BLOCKS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_outputs_and_gradients_are_those_of_transformers(
    build: Callable[[], nn.Module], autocast: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_blocks, "_has_fused_norm", lambda _: fused)
    plain, lean = pair(build, torch.float32)
    states, upstream = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        mine, reference = run(lean, states, upstream), run(plain, states, upstream)
    if autocast:
        # Norms of transformers widen to the weight's dtype; each product that reads the result casts it again.
        assert mine[0].dtype == torch.bfloat16
        mine[0] = mine[0].to(reference[0].dtype)
    for found, exact_value in zip(mine, reference, strict=True):
        assert found.dtype == exact_value.dtype
        torch.testing.assert_close(found, exact_value, **({"rtol": 2e-2, "atol": 1e-1} if autocast else {}))


def test_a_compiled_norm_is_one_graph_even_if_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lean = pair(BLOCKS[0], torch.float32)
    monkeypatch.setattr(lean_blocks, "_has_fused_norm", lambda _: True)
    compiled: Any = torch.compile(lean, backend="aot_eager", fullgraph=True)
    states, upstream = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    for found, expected in zip(run(compiled, states, upstream), run(plain, states, upstream), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("build", BLOCKS)
def test_errors_in_bfloat16_are_those_of_transformers(build: Callable[[], nn.Module]) -> None:
    plain, lean = pair(build, torch.bfloat16)
    states, upstream = torch.randn(50, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    exact = run(copy.deepcopy(plain).float(), states.float(), upstream.float())
    for found, theirs, exact_value in zip(
        run(lean, states, upstream), run(plain, states, upstream), exact, strict=True
    ):
        assert found.dtype == theirs.dtype == torch.bfloat16
        error, of_theirs = ((each.float() - exact_value).norm() for each in (found, theirs))
        assert error <= 1.5 * of_theirs


@pytest.mark.parametrize("build", BLOCKS)
def test_gradients_are_those_of_finite_differences(build: Callable[[], nn.Module]) -> None:
    _, lean = pair(build, torch.float64)
    names, weights = zip(*lean.named_parameters(), strict=True)

    def output(states: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(lean, dict(zip(names, weights, strict=True)), states)

    states = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (states, *weights))


@pytest.mark.parametrize(("build", "share"), [(BLOCKS[0], 0.6), (BLOCKS[3], 0.85)])
def test_fewer_bytes_are_kept_for_the_backward_pass(build: Callable[[], nn.Module], share: float) -> None:
    plain, lean = pair(build, torch.float32)
    assert kept_bytes(lean) <= share * kept_bytes(plain)


def test_products_that_read_a_norm_share_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_blocks, "_has_fused_norm", lambda _: True)
    plain = nn.Sequential(LlamaRMSNorm(16), LlamaMLP(LlamaConfig(**SIZES)))
    lean = copy.deepcopy(plain)
    use_memory_saving_blocks(lean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = torch.randn(3, 16)
        assert torch.equal(lean(states), plain(states))
        # The norm's input in float32; its output, the gate, the other factor, their product and weights in bfloat16.
        assert kept_bytes(lean) == 64 * (16 * 4 + 16 * 2 + 3 * 24 * 2) + 3 * 16 * 24 * 2


def kept_bytes(block: nn.Module) -> int:
    """Return the bytes that a forward pass keeps in addition to the weights."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(64, 16, requires_grad=True))
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def test_weights_keep_their_names_and_inner_norms_are_found() -> None:
    attention = Qwen3Attention(Qwen3Config(**SIZES, head_dim=8), layer_idx=0)
    names = list(attention.state_dict())
    use_memory_saving_blocks(attention)
    assert list(attention.state_dict()) == names
    assert isinstance(attention.q_norm, LeanRMSNorm) and isinstance(attention.k_norm, LeanRMSNorm)


@pytest.mark.parametrize(
    "block",
    [
        Gemma3RMSNorm(16),
        Gemma3MLP(Gemma3TextConfig(**SIZES)),
        LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu")),
        nn.RMSNorm(16),
    ],
)
def test_blocks_that_compute_something_else_are_not_replaced(block: nn.Module) -> None:
    before = type(block)
    use_memory_saving_blocks(block)
    assert type(block) is before
