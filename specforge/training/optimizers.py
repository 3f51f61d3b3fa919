"""Optimizers: torch's AdamW, torch's Muon for matrices with AdamW for the rest, or any class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from specforge.bounds import Amount, LearningRate
from specforge.private.torch import let_clip, let_muon_use_float32
from specforge.training.class_paths import build, check_arguments, class_at, takes

# What the names of the heads of draft networks end in: lm_head, head, markov_head.
HEAD = "head"

OWN = ("adamw", "muon")
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(BaseModel):
    """Settings of the optimizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        default="adamw",
        description="adamw; muon, which is Muon for matrices of the layers, scaled to AdamW's step, and AdamW for the "
        "rest; or the class path of an optimizer, such as torch.optim.SGD.",
    )
    lr: LearningRate = Field(default=1e-4, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the two moments.")
    weight_decay: Amount = Field(default=0.0, description="Decoupled weight decay of matrices.")
    options: dict[str, Any] = Field(default={}, description="Further arguments of an optimizer given by class path.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in OWN:
            class_at(name, Optimizer, OWN)
        return name

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.name not in OWN:
            check_arguments(self.name, self.optimizer_class, self.arguments)
        elif self.options:
            raise ValueError(f"options are for an optimizer given by its class path; {self.name} has none")
        return self

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """The class at the path ``name``."""
        return class_at(self.name, Optimizer, OWN)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the class besides the parameters."""
        decay = {"weight_decay": self.weight_decay} if takes(self.optimizer_class, "weight_decay") else {}
        return {"lr": self.lr, **decay, **self.options}


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Create the optimizer of a module's trainable parameters.

    Args:
        module: The draft.
        settings: The optimizer and its constants.
    """
    trainable = {name: one for name, one in module.named_parameters() if one.requires_grad}
    by_muon = [name for name in trainable if settings.name == "muon" and _is_hidden_matrix(module, name)]
    matrices = [one for name, one in trainable.items() if one.ndim >= 2 and name not in by_muon]
    vectors = [one for one in trainable.values() if one.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name not in OWN:
        return build("model.optimizer", settings.optimizer_class, groups, settings.arguments)
    adamw = AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over the weights per step: six times as fast, also on a CPU
    )
    let_clip(adamw)
    if not by_muon:
        return adamw
    let_muon_use_float32()
    muon = Muon(
        [trainable[name] for name in by_muon],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return JointOptimizer([muon, adamw])


class JointOptimizer(Optimizer):
    """Several optimizers over disjoint parameters that act as one, with one state and one list of groups.

    Args:
        optimizers: The optimizers; their groups and states are shared, so that a schedule changes them.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([{"params": group["params"], "lr": group["lr"]} for group in groups], defaults={})
        self.param_groups = groups
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimizer; the closure, if any, is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all optimizers."""
        super().load_state_dict(state_dict)
        # Loading replaces the state and groups; share them again.
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]


def _is_hidden_matrix(module: nn.Module, name: str) -> bool:
    """Return whether Muon applies: it is meant for matrices between hidden states, not embeddings and heads."""
    *owners, kind = name.split(".")
    is_of_head = any(owner.endswith(HEAD) for owner in owners)
    return isinstance(module.get_submodule(".".join(owners)), nn.Linear) and kind == "weight" and not is_of_head
