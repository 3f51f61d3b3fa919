"""One of several processes that run tasks together; started by ``launching.py``."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from specforge.__main__ import main
from specforge.training.module import DraftModule
from specforge.verifier.features import capture, check_logits, decoder_layers
from specforge.verifier.loading import VerifierLoading, load_verifier
from specforge.verifier.parts import VerifierParts
from specforge.verifier.sharding import load_sharded_verifier

# Calls that wait for the other processes unless they are asynchronous.
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "barrier"),
    *("all_gather_object", "broadcast_object_list", "gather_object"),
)


def run(words: list[str]) -> None:
    """Run a command of specforge."""
    status = main(words)
    assert status == 0, f"specforge {' '.join(words)} ended with {status}"


def run_with_one_reduction(words: list[str]) -> None:
    """Run a command; check that a step waits for other processes at most once, besides the reduction of gradients.

    Gradients are reduced by torch below Python. The first step prepares and the last one saves, so they are excluded.
    """
    calls: list[list[str]] = []
    step, patched = DraftModule.training_step, {}

    def training_step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
        calls.append([])
        return step(self, batch, batch_idx)

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if calls and not options.get("async_op"):
                calls[-1].append("".join(traceback.format_stack(limit=4)[:-1]))
            return patched[name](*arguments, **options)

        return call

    DraftModule.training_step = training_step  # type: ignore[method-assign]
    for name in COLLECTIVES:
        patched[name] = getattr(torch.distributed, name)
        setattr(torch.distributed, name, counted(name))
    run(words)
    DraftModule.training_step = step  # type: ignore[method-assign]
    for name, original in patched.items():
        setattr(torch.distributed, name, original)
    for waits in calls[1:-1]:
        assert len(waits) == 1, "\n".join(waits) or "nothing is counted"
    assert len(calls) > 3


def captures_the_same(verifiers: Mapping[str, str]) -> None:
    """Compare a sharded verifier with an unsharded one, bit for bit, for each model family; run it after a command."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for family, folder in verifiers.items():
        unsharded = load_verifier(folder)
        sharded = load_sharded_verifier(folder, VerifierLoading(), torch.device("cpu"))
        check_logits(sharded)
        assert not any(weight.requires_grad for weight in sharded.parameters())
        # Each process has different rows, of different lengths.
        tokens = (torch.arange(14 + rank) * (7 + rank)).remainder(60)[None]
        positions = torch.cat([torch.arange(6), torch.arange(8 + rank)])[None]
        aux_layers = [0, 3, 5]
        expected = capture(unsharded, tokens, positions, aux_layers)
        found = capture(sharded, tokens, positions, aux_layers)
        assert torch.equal(found.aux, expected.aux) and torch.equal(found.last, expected.last), family
        logits = VerifierParts.of(sharded).logits(found.last)
        assert torch.equal(logits, VerifierParts.of(unsharded).logits(expected.last)), family
        for layer in decoder_layers(sharded):
            for name, parameter in layer.named_parameters():
                assert isinstance(parameter, DTensor), (family, name)
                assert parameter.to_local().numel() <= -(-parameter.shape[0] // processes) * parameter[0].numel(), name


TASKS: dict[str, Callable[[Any], None]] = {
    function.__name__: function for function in (run, run_with_one_reduction, captures_the_same)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, argument in json.loads(sys.argv[1]):
        TASKS[name](argument)
