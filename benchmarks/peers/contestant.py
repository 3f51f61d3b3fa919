"""A contestant: a process that trains a draft step by step, by commands on standard input.

It is started with the folder of a task (see ``task``) and reads one command per line:

* ``step``: one training step: the forward pass of all draft steps, loss, backward pass and AdamW.
* ``gradients FILE``: only forward and backward pass; the gradients are written to a safetensors file.
* ``memory``: two steps; the memory of the second is measured.

The answer is a line of JSON. The packages' environments share only this file, ``task`` and ``drafting``, which need
torch, safetensors and the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from task import Task
from torch import Tensor, nn

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)

# The loss of the batch, and the trained weights by the task's names.
Trainer = tuple[Callable[[], Tensor], Mapping[str, nn.Parameter]]


def serve(build: Callable[[Task], Trainer]) -> None:
    """Answer commands until the input ends.

    Args:
        build: Creates the package's model and batch of a task.
    """
    # Output of packages must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    loss, weights = build(Task.read(Path(sys.argv[1])))
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)

    def step() -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {
            "loss": value.item(),
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
        }

    def gradients(file: str) -> dict[str, Any]:
        value = loss()
        value.backward()
        save_file({name: weight.grad.contiguous() for name, weight in weights.items() if weight.grad is not None}, file)
        optimizer.zero_grad()
        return {"loss": value.item()}

    def memory() -> dict[str, Any]:
        step()
        before = start_of_peak()
        step()
        return {"bytes": resident("VmHWM") - before}

    commands: dict[str, Callable[..., dict[str, Any]]] = {"step": step, "gradients": gradients, "memory": memory}
    print(json.dumps({"trained": sum(weight.numel() for weight in weights.values())}), file=answers)
    for line in sys.stdin:
        name, *arguments = line.split()
        print(json.dumps(commands[name](*arguments)), file=answers)


def start_of_peak() -> int:
    """Release freed memory, reset the peak, and return the resident memory, in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(what: str) -> int:
    """Return an entry of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)
