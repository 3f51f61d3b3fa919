"""Optimizers: AdamW, or Muon for matrices with AdamW for the rest; both torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from specforge.bounds import Amount, LearningRate

# What the names of the heads of draft networks end in: lm_head, head, markov_head.
HEAD = "head"

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(BaseModel):
    """How weights are updated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: matrices of the layers by Muon, scaled to AdamW's step; the rest by AdamW."
    )
    lr: LearningRate = Field(default=1e-4, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the two moments.")
    weight_decay: Amount = Field(default=0.0, description="Decoupled weight decay of matrices.")


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Create the optimizer of a module's trainable parameters.

    Args:
        module: The draft.
        settings: Which optimizer, and its constants.
    """
    trainable = {name: one for name, one in module.named_parameters() if one.requires_grad}
    by_muon = [name for name in trainable if settings.name == "muon" and _is_hidden_matrix(module, name)]
    matrices = [one for name, one in trainable.items() if one.ndim >= 2 and name not in by_muon]
    vectors = [one for one in trainable.values() if one.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adamw = AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # a step in one pass over the weights: six times as fast on a CPU, too
    )
    # Lightning does not clip the gradients of optimizers that unscale them themselves, as fused ones offer to.
    adamw._step_supports_amp_scaling = False
    if not by_muon:
        return adamw
    muon = Muon(
        [trainable[name] for name in by_muon],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return JointOptimizer([muon, adamw])


class JointOptimizer(Optimizer):
    """Several optimizers over disjoint parameters that step as one, with one state and one list of groups.

    Args:
        optimizers: Their groups are shared, so that a schedule reaches them, and so is their state.
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
        # Loading replaces state and groups, which the optimizers must go on with.
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]


def _is_hidden_matrix(module: nn.Module, name: str) -> bool:
    """Muon is meant for matrices between hidden states, not for embeddings and heads."""
    *owners, kind = name.split(".")
    is_of_head = any(owner.endswith(HEAD) for owner in owners)
    return isinstance(module.get_submodule(".".join(owners)), nn.Linear) and kind == "weight" and not is_of_head
