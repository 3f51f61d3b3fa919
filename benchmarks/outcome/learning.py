"""Training of a peer: its model, loss and optimizer in our loop, since its own loop requires an accelerator.

A peer's script is started as ``SCRIPT ROWS --rate RATE --seed SEED --output FOLDER`` in the peer's environment and
writes its draft there in the package's layout.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from rows import Rows
from torch import Tensor

# Steps between two log lines.
REPORTS = 50


class Learner(ABC):
    """A peer's draft in training."""

    @abstractmethod
    def loss(self, documents: list[dict[str, Tensor]]) -> Tensor:
        """Return the loss of the documents of an optimizer step (see ``Rows.documents``)."""

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients, update the weights, advance the schedule, and clear the gradients."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the draft."""


def learn(build: type[Learner]) -> None:
    """Train a draft on the rows, and write it.

    Args:
        build: Makes a learner of the rows and a learning rate.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rows = Rows.read(arguments.rows)
    learner = build(rows, arguments.rate)  # type: ignore[call-arg]
    for step in range(len(rows.order)):
        loss = learner.loss(rows.documents(step))
        loss.backward()
        learner.update()
        if (step + 1) % REPORTS == 0:
            print(f"  step {step + 1} of {len(rows.order)}: loss {loss.item():.3f}", file=sys.stderr)
    learner.save(arguments.output)
