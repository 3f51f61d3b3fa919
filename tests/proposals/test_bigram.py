from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specforge.errors import UsageError
from specforge.proposals.bigram import BigramProposer, BigramTokenProposalConfig
from specforge.sampling import RandomSource, Sampling


def followed(folder: Path, successors: list[int], *sequences: list[int], tokens: int = 4) -> list[list[int]]:
    save_file({"successors": torch.tensor(successors)}, folder / "table.safetensors")
    config = BigramTokenProposalConfig(speculative_tokens=tokens, table=str(folder / "table.safetensors"))
    proposer = BigramProposer(config, Sampling(), RandomSource())
    assert proposer.depth == tokens and not proposer.needs_draft
    proposal = proposer.propose([torch.tensor(sequence) for sequence in sequences], None)
    assert proposal.log_q is None
    return [row[:count] for row, count in zip(proposal.tokens.tolist(), proposal.counts.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("successors", "text", "chain"),
    [
        ([1, 2, 3, -1], [0], [1, 2, 3]),
        ([1, 2, 3, -1], [0, 3], []),
        ([1, 2, 3, -1], [3, 2, 1], [2, 3]),
        ([1, 0, 0, 0], [0], [1, 0, 1, 0]),
        ([0, 0], [1], [0, 0, 0, 0]),
        ([-1, -1], [1, 0], []),
    ],
)
def test_the_table_is_followed_from_the_last_token(
    successors: list[int], text: list[int], chain: list[int], tmp_path: Path
) -> None:
    assert followed(tmp_path, successors, text) == [chain]


def test_each_sequence_follows_from_its_own_last_token(tmp_path: Path) -> None:
    assert followed(tmp_path, [1, 2, 3, -1], [2, 2, 0], [3], [0, 2], tokens=2) == [[1, 2], [], [3]]


@pytest.mark.parametrize("content", [None, b"nonsense", b""])
def test_a_missing_or_damaged_table_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    if content is not None:
        path.write_bytes(content)
    proposer = BigramProposer(BigramTokenProposalConfig(table=str(path)), Sampling(), RandomSource())
    with pytest.raises(UsageError, match=r"bigram: .*table\.safetensors holds no table 'successors'"):
        proposer.propose([torch.tensor([0])], None)


def test_another_tensor_is_no_table(tmp_path: Path) -> None:
    save_file({"counts": torch.zeros(3)}, tmp_path / "table.safetensors")
    config = BigramTokenProposalConfig(table=str(tmp_path / "table.safetensors"))
    with pytest.raises(UsageError, match="holds no table 'successors'"):
        BigramProposer(config, Sampling(), RandomSource()).propose([torch.tensor([0])], None)
