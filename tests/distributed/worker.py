"""One of several processes that do tasks together; started by ``launching.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from specforge.__main__ import main
from specforge.verifier.features import capture, check_logits, decoder_layers
from specforge.verifier.loading import VerifierLoading, load_verifier
from specforge.verifier.parts import VerifierParts
from specforge.verifier.sharding import load_sharded_verifier


def run(words: list[str]) -> None:
    """Run a command of specforge."""
    status = main(words)
    assert status == 0, f"specforge {' '.join(words)} ended with {status}"


def captures_the_same(verifiers: Mapping[str, str]) -> None:
    """Compare a sharded verifier with a whole one, bit for bit, for a folder of each model family; after a run."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for family, folder in verifiers.items():
        whole = load_verifier(folder)
        sharded = load_sharded_verifier(folder, VerifierLoading(), torch.device("cpu"))
        check_logits(sharded)
        assert not any(one.requires_grad for one in sharded.parameters())
        # Each process has rows of its own, of its own length.
        tokens = (torch.arange(14 + rank) * (7 + rank)).remainder(60)[None]
        positions = torch.cat([torch.arange(6), torch.arange(8 + rank)])[None]
        aux_layers = [0, 3, 5]
        expected = capture(whole, tokens, positions, aux_layers)
        found = capture(sharded, tokens, positions, aux_layers)
        assert torch.equal(found.aux, expected.aux) and torch.equal(found.last, expected.last), family
        logits = VerifierParts.of(sharded).logits(found.last)
        assert torch.equal(logits, VerifierParts.of(whole).logits(expected.last)), family
        for layer in decoder_layers(sharded):
            for name, parameter in layer.named_parameters():
                assert isinstance(parameter, DTensor), (family, name)
                assert parameter.to_local().numel() <= -(-parameter.shape[0] // processes) * parameter[0].numel(), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, argument in json.loads(sys.argv[1]):
        {"run": run, "captures_the_same": captures_the_same}[name](argument)
