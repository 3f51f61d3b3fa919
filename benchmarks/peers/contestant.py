"""What each contestant is: a process that trains a draft step by step, as it is told line by line.

It is started with the folder of a task (see ``task``) and reads commands, one a line:

* ``step``: one training step, which is the forward pass of all draft steps, loss, backward pass and AdamW.
* ``gradients FILE``: forward and backward pass alone; the gradients are written to a safetensors file.
* ``memory``: a step, and then another one whose memory is measured.

The answer is a line of JSON. This file, ``task`` and ``drafting`` are all that the packages' environments share: they
need torch, safetensors and the standard library.
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

# The loss of one batch, and the weights that are trained, by the names that the task has for them.
Trainer = tuple[Callable[[], Tensor], Mapping[str, nn.Parameter]]


def serve(build: Callable[[Task], Trainer]) -> None:
    """Answer commands until there are no more.

    Args:
        build: Makes the package's own model and batch of a task.
    """
    # What packages print must not get among the answers.
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
    """Give freed memory back, let the peak start from here, and return what is resident, in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(what: str) -> int:
    """Return an entry of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)
