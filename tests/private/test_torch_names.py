"""The private names of torch and torchmetrics work as assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision.amp import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import _muon
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from specforge.private import torch as private
from specforge.private.torchmetrics import UncastMetric


class Calls(private.TorchDispatchMode):
    """Records the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(function)
        return function(*args, **(kwargs or {}))


def test_operations_are_those_that_public_calls_run():
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    rows, chosen = torch.arange(3.0), torch.tensor([True, False, True])
    with Calls() as calls:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
        rows[0].item()
        rows[chosen]
        rows[chosen] = 0
    packets = [private.packet(operation) for operation in calls.found]
    assert private.ATTENTION in packets and private.ATTENTION_BACKWARD in packets
    assert private.READS_VALUE in calls.found
    assert len(private.CHOOSING.intersection(calls.found)) >= 2


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_orthogonalises_in_float32_on_a_cpu(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", private._newton_schulz_in_bfloat16)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradient, steps = start.clone(), {}
    for name, prepare in (("bfloat16", lambda: None), ("float32", private.let_muon_use_float32)):
        prepare()
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = gradient.clone()
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0).step()
        steps[name] = -parameter.detach()
    torch.testing.assert_close(gradient, start)
    # The same iteration, to bfloat16's rounding; torch's own is not exact.
    torch.testing.assert_close(steps["float32"], steps["bfloat16"], rtol=0.05, atol=0.02)
    assert not torch.equal(steps["float32"], steps["float32"].bfloat16().float())
    singular = torch.linalg.svdvals(steps["float32"])
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_attention_and_its_gradient_take_a_mask():
    query, key, value = (torch.randn(1, 1, 3, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 3, 3).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), float("-inf"))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    expected.sum().backward()
    given = [tensor.detach() for tensor in (query, key, value)]
    output, logsumexp = private.ATTENTION(*given, attn_mask=mask, scale=0.3)
    found = private.ATTENTION_BACKWARD(
        torch.ones_like(output), *given, output, logsumexp, 0.0, False, attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(output, expected.detach())
    for gradient, parameter in zip(found, (query, key, value), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_attention_over_sequences_takes_and_gives_a_log_sum_exp():
    query, key = torch.empty(9, 4, 16, device="meta"), torch.empty(12, 2, 16, device="meta")
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    window = {"scale": 0.3, "window_size_left": 4, "window_size_right": 0}
    output, logsumexp, *_ = private.FLASH_ATTENTION(query, key, key, ends, ends, 5, 7, 0.0, True, False, **window)
    assert output.shape == query.shape and logsumexp.shape == (4, 9) and logsumexp.dtype == torch.float32
    state = torch.empty(2, dtype=torch.uint64, device="meta"), torch.empty(0, device="meta")
    found = private.FLASH_ATTENTION_BACKWARD(
        *(output, query, key, key, output, logsumexp, ends, ends, 5, 7, 0.0, True, *state), **window
    )
    assert [one.shape for one in found] == [query.shape, key.shape, key.shape]


def test_the_gradient_of_a_layer_norm_takes_a_mean_and_a_scale():
    states, weight, gradient = (
        torch.randn(5, 8, requires_grad=True),
        torch.randn(8, requires_grad=True),
        torch.randn(5, 8),
    )
    mean = states.detach().mean(-1, keepdim=True)
    scale = (states.detach().var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
    expected = torch.autograd.grad(torch.nn.functional.layer_norm(states, (8,), weight), (states, weight), gradient)
    given = gradient, states.detach(), [8], mean, scale, weight.detach(), None
    of_states, of_weight, of_bias = private.LAYER_NORM_BACKWARD(*given, [True, True, False])
    torch.testing.assert_close((of_states, of_weight), expected)
    assert of_bias is None and private.LAYER_NORM_BACKWARD(*given, [False, True, False])[0] is None


def test_the_product_of_experts_has_that_name():
    assert private.packet(private.GROUPED_PRODUCT.default) is private.GROUPED_PRODUCT


class Wrapped(Tensor):
    __torch_function__ = private.NO_TORCH_FUNCTION

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise LookupError("dispatched")


def test_a_wrapper_has_the_shape_of_its_content_but_not_its_values():
    content = torch.empty(4, 6, dtype=torch.bfloat16, device="meta").T[1:]
    found = private.wrapper(Wrapped, content)
    assert type(found) is Wrapped and found.device.type == "cpu"
    assert (found.shape, found.dtype) == (content.shape, content.dtype)
    assert (found.stride(), found.storage_offset()) == (content.stride(), content.storage_offset())
    with pytest.raises(LookupError, match="dispatched"):
        torch.add(found, 1)


def test_nested_values():
    nested = {"a": [torch.ones(1), 2], "b": (torch.zeros(1),)}
    assert [leaf for leaf in private.tree_leaves(nested) if not isinstance(leaf, Tensor)] == [2]
    assert private.tree_map_only(Tensor, float, nested) == {"a": [1.0, 2], "b": (0.0,)}
    assert private.tree_map(float, nested) == {"a": [1.0, 2.0], "b": (0.0,)}


def test_only_the_tensors_of_the_module_itself_are_changed():
    outer = nn.Sequential(nn.Linear(2, 2))
    outer.bias = nn.Parameter(torch.zeros(2))
    outer.scale = nn.Buffer(torch.ones(2))
    private.map_own(outer, lambda tensor: tensor + 5)
    assert outer.bias.tolist() == [5, 5] and outer.scale.tolist() == [6, 6]
    assert outer[0].bias.abs().max() < 1


def test_gradients_of_fused_optimizers_can_be_clipped():
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 100.0)
    optimizer = torch.optim.AdamW([weight], fused=True)
    precision = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="clip"):
        precision.clip_gradients(optimizer, clip_val=1.0)
    private.let_clip(optimizer)
    precision.clip_gradients(optimizer, clip_val=1.0)
    assert float(weight.grad) == pytest.approx(1.0)


def test_a_summary_goes_to_the_writers_own_file(tmp_path: Path):
    writer = SummaryWriter(str(tmp_path))
    private.add_summary(writer, scalar("tag", 3.0))
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("tag")[0].value == 3.0


class Total(UncastMetric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self) -> None: ...

    def compute(self) -> None: ...


def test_states_are_moved_and_not_cast():
    module = nn.Sequential(Total(), nn.Linear(1, 1))
    module.half()
    assert module[0].total.dtype == torch.float64 and module[1].weight.dtype == torch.float16
    assert module.to("meta")[0].total.device.type == "meta"
