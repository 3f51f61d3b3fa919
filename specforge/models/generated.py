"""What a draft generated, and how."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """What ``generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: Prompts and what was added, int64 [B, T + new].
        rounds: Verifier forward passes of each sequence after its prompt's, int64 [B].
        accepted_by_position: How many of them accepted at least k = 1 .. K tokens, int64 [B, K], where K is the most
            that a round accepted.
        seconds: Time of all of it, the prompts' pass included.
    """

    sequences: Tensor
    rounds: Tensor
    accepted_by_position: Tensor
    seconds: float

    @property
    def acceptance_length(self) -> float:
        """Tokens of a round, the verifier's own included, over all sequences; 1 without any round."""
        rounds = int(self.rounds.sum())
        return 1 + int(self.accepted_by_position.sum()) / rounds if rounds else 1.0
