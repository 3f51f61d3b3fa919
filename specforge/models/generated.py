"""The result of ``generate``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """Result of ``generate`` with ``return_dict_in_generate=True``.

    Attributes:
        sequences: Prompts and generated tokens, int64 [B, T + new].
        rounds: Number of verifier forward passes of each sequence after its prompt's, int64 [B].
        accepted_by_position: Number of these rounds that accepted at least k = 1 .. K tokens, int64 [B, K]; K is the
            largest number that a round accepted.
        seconds: Total time in seconds, including the prompts' forward pass.
    """

    sequences: Tensor
    rounds: Tensor
    accepted_by_position: Tensor
    seconds: float

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per round over all sequences, including the verifier's own; 1 if there was no round."""
        rounds = int(self.rounds.sum())
        return 1 + int(self.accepted_by_position.sum()) / rounds if rounds else 1.0
