from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import AdamW, Muon

from specforge.errors import UsageError
from specforge.training.optimizers import JointOptimizer, OptimizerSettings, build_optimizer
from specforge.training.schedules import ScheduleSettings, build_schedule

MUON = {"fc.weight", "layers.0.weight", "layers.1.weight"}
MATRICES = MUON | {"embed_tokens.weight", "lm_head.weight"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.fc = nn.Linear(4, 6, bias=False)
        self.layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6, bias=False)])
        self.norm = nn.RMSNorm(6)
        self.lm_head = nn.Linear(6, 5, bias=False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(self.embed_tokens(tokens))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


def make_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def train(network: Network, optimizer: Any, steps: int, seed: int = 0, schedule: Any = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(5, (8,), generator=generator)
        nn.functional.cross_entropy(network(tokens), (tokens + 1) % 5).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def names_of(network: Network, optimizer: Any) -> set[str]:
    ids = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return {name for name, parameter in network.named_parameters() if id(parameter) in ids}


def trainable(network: Network) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_muon_takes_the_hidden_matrices() -> None:
    network = make_network()
    joint = build_optimizer(network, OptimizerSettings(name="muon"))
    assert isinstance(joint, JointOptimizer)
    muon, adamw = joint.optimizers
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    assert names_of(network, muon) == MUON
    assert names_of(network, adamw) == trainable(network) - MUON
    assert names_of(network, joint) == trainable(network)
    assert sum(len(group["params"]) for group in joint.param_groups) == len(trainable(network))


def test_adamw_updates_everything() -> None:
    network = make_network()
    optimizer = build_optimizer(network, OptimizerSettings(name="adamw", betas=(0.8, 0.7), lr=0.5))
    assert type(optimizer) is AdamW
    assert names_of(network, optimizer) == trainable(network)
    assert all(group["betas"] == (0.8, 0.7) and group["lr"] == 0.5 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name: Any) -> None:
    network = make_network()
    optimizer = build_optimizer(network, OptimizerSettings(name=name, lr=0.1, weight_decay=0.5))
    before = {key: weight.detach().clone() for key, weight in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for key, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.5 if key in MATRICES else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * factor, msg=key)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_moves_every_trainable_parameter(name: Any) -> None:
    network = make_network()
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    train(network, build_optimizer(network, OptimizerSettings(name=name, lr=1e-2)), 2)
    changed = {key for key, parameter in network.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == trainable(network)


def test_muon_steps_are_as_large_as_adamws() -> None:
    moved = {}
    for name in ("adamw", "muon"):
        network = make_network()
        before = network.layers[1].weight.detach().clone()
        train(network, build_optimizer(network, OptimizerSettings(name=name, lr=1e-3)), 1)  # type: ignore[arg-type]
        moved[name] = float((network.layers[1].weight - before).square().mean().sqrt())
    assert 0.1 < moved["muon"] / moved["adamw"] < 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_resumes_from_a_stored_state(name: Any) -> None:
    settings = OptimizerSettings(name=name, lr=1e-2, weight_decay=0.1)
    schedule_settings = ScheduleSettings(name="cosine", warmup=2)
    network = make_network()
    optimizer = build_optimizer(network, settings)
    schedule = build_schedule(optimizer, schedule_settings, 10)
    train(network, optimizer, 4, seed=1, schedule=schedule)
    file = io.BytesIO()
    torch.save((network.state_dict(), optimizer.state_dict(), schedule.state_dict()), file)
    train(network, optimizer, 3, seed=2, schedule=schedule)

    again = make_network(seed=9)
    restored = build_optimizer(again, settings)
    other_schedule = build_schedule(restored, schedule_settings, 10)
    file.seek(0)
    weights, state, position = torch.load(file)
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    other_schedule.load_state_dict(position)
    train(again, restored, 3, seed=2, schedule=other_schedule)
    for key, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_state_of_another_optimizer_is_refused() -> None:
    network = make_network()
    muon = build_optimizer(network, OptimizerSettings(name="muon"))
    adamw = build_optimizer(network, OptimizerSettings(name="adamw"))
    with pytest.raises((KeyError, ValueError)):
        muon.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("loaded", [False, True])
def test_a_schedule_reaches_all_groups(loaded: bool) -> None:
    network = make_network()
    optimizer = build_optimizer(network, OptimizerSettings(name="muon", lr=1.0))
    assert isinstance(optimizer, JointOptimizer)
    schedule = build_schedule(optimizer, ScheduleSettings(name="linear", warmup=0), 4)
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    for expected in (0.75, 0.5, 0.25, 0.0):
        train(network, optimizer, 1)
        schedule.step()
        for inner in optimizer.optimizers:
            assert [group["lr"] for group in inner.param_groups] == pytest.approx([expected] * len(inner.param_groups))


def test_a_closure_is_evaluated_once() -> None:
    network, calls = make_network(), []
    optimizer = build_optimizer(network, OptimizerSettings(name="muon"))

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = network(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert calls == [True]


def test_zero_grad_reaches_all_groups() -> None:
    network = make_network()
    optimizer = build_optimizer(network, OptimizerSettings(name="muon"))
    network(torch.tensor([1])).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"weight_decay": -1}, {"name": "sgd"}, {"learning_rate": 1}], ids=str)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimizerSettings(**wrong)


@pytest.mark.parametrize("betas", [(1.5, 0.9), (0.9, -0.1)])
def test_impossible_betas_are_refused(betas: tuple[float, float]) -> None:
    """Before anything is loaded, not by torch during the run."""
    with pytest.raises(ValidationError):
        OptimizerSettings(betas=betas)


def test_any_optimizer_can_be_given_by_its_class_path() -> None:
    settings = OptimizerSettings(name="torch.optim.SGD", lr=0.1, weight_decay=0.2, options={"momentum": 0.5})
    network = make_network()
    optimizer = build_optimizer(network, settings)
    assert type(optimizer) is torch.optim.SGD
    assert names_of(network, optimizer) == trainable(network)
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["momentum"], matrices["weight_decay"]) == (0.1, 0.5, 0.2)
    assert vectors["weight_decay"] == 0.0
    # An optimizer without weight decay gets none.
    assert isinstance(build_optimizer(network, OptimizerSettings(name="torch.optim.Rprop")), torch.optim.Rprop)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("muno", {}, "give adamw, muon, or the path of a subclass of torch.optim.optimizer.Optimizer"),
        ("torch.nn.Linear", {}, "give adamw, muon, or the path"),
        ("torch.optim.SGDD", {}, "cannot be imported: .*SGDD"),
        ("no.such.Optimizer", {}, "cannot be imported: No module named 'no'"),
        ("torch.optim.SGD", {"momentun": 1}, "unexpected keyword argument 'momentun'; its arguments are lr, momentum"),
        ("muon", {"momentum": 0.9}, "options are for an optimizer given by its class path"),
    ],
)
def test_classes_that_are_not_optimizers_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimizerSettings(name=name, options=options)


def test_any_schedule_can_be_given_by_its_class_path() -> None:
    optimizer = torch.optim.SGD(make_network().parameters(), lr=1.0, momentum=0.9)
    path = "torch.optim.lr_scheduler"
    schedule = build_schedule(optimizer, ScheduleSettings(name=f"{path}.CosineAnnealingLR"), 8)
    rates = []
    for _ in range(9):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 1.0 and rates[4] == pytest.approx(0.5) and rates[8] == pytest.approx(0.0)
    with pytest.raises(ValidationError, match="missing a required argument: 'max_lr'"):
        ScheduleSettings(name=f"{path}.OneCycleLR")
    one_cycle = ScheduleSettings(name=f"{path}.OneCycleLR", options={"max_lr": 0.1})
    with pytest.raises(UsageError, match=r"model\.schedule\.options: optimizer must support"):
        build_schedule(torch.optim.Rprop(make_network().parameters()), one_cycle, 8)
