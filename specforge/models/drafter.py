"""The interface through which proposal methods run a draft of any algorithm.

Before the first round, ``begin`` gives the first token of each sequence. No state of the verifier precedes it, so
drafts that read states do not need it; a language model as draft reads the whole text. A round starts with ``commit``:
the verifier has decided some tokens, and the draft reads their features. The result is the distribution of the next
token to draft, at the *root*. ``step`` then extends chosen nodes, as deep and as wide as the proposal method needs; the
next ``commit`` drops all of them.

Letters in shapes: B sequences, Q committed tokens, W stepped nodes, D draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from specforge.verifier.features import Features


class Drafter(ABC):
    """Drafts for a batch of B sequences.

    Attributes:
        root: Logits of the token that follows the last committed one, [B, D]; set by ``commit``.
        draft_ids: The verifier's ids of the draft tokens, ascending, int64 [D]; None if the vocabularies are the same.
        max_depth: Maximum depth of drafted tokens; None if it is not bounded.
        reads_weights_once: Whether a round reads each weight once, however many tokens it drafts: in one pass, or
            with other weights for each token. Otherwise each token takes a pass.
    """

    root: Tensor
    draft_ids: Tensor | None = None
    max_depth: int | None = None
    reads_weights_once: ClassVar[bool] = False

    def begin(self, tokens: Tensor) -> None:  # noqa: B027  (most drafts need nothing of it)
        """Take in the first token of each sequence, x_0, before anything else; ``commit`` brings those after it.

        Args:
            tokens: The verifier's ids, int64 [B].
        """

    @abstractmethod
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Read the tokens that the verifier has decided since the last round, and drop the nodes of that round.

        Args:
            tokens: The token *after* each newly processed one, the verifier's ids, int64 [B, Q]. For a sequence
                x_0 .. x_n of which the verifier has processed the first n tokens: those up to x_n.
            features: The verifier's states at the processed tokens, [B, Q, ...]: the one before each of ``tokens``.
            counts: Number of real tokens of each row, int64 [B]; padding follows them.
        """

    @abstractmethod
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Extend some nodes.

        Nodes are numbered from 0 in each row, in the order of the calls.

        Args:
            tokens: The token of each node, the verifier's ids, int64 [B, W].
            parents: The parent of each node, int64 [B, W]; -1 is the root.

        Returns:
            Logits of the token that follows each node, [B, W, D].
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences, int64 [rows]; the next call must be ``commit``."""

    def to_verifier(self, tokens: Tensor) -> Tensor:
        """Translate draft tokens [...] to the verifier's ids."""
        return tokens if self.draft_ids is None else self.draft_ids[tokens]
