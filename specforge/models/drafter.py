"""A draft at work on sequences: what every proposal method steps through, whatever the algorithm.

Before the first round, ``begin`` gives the first token of each sequence. No state of the verifier comes before it, so
drafts that read states do without; a draft that is a language model reads the whole text. A round begins with
``commit``: the verifier has decided some tokens, and the draft takes in their features. Its answer is the distribution
of the next token to draft, that of the *root*. ``step`` then drafts on behind chosen nodes, as deep and as broad as a
proposal method likes; none of that outlives the next ``commit``.

Letters in shapes: B sequences, Q committed tokens, W stepped nodes, D draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from specforge.verifier.features import Features


class Drafter(ABC):
    """Drafts for B sequences side by side.

    Attributes:
        root: Logits of the token that follows the last committed one, [B, D]; set by ``commit``.
        draft_ids: The verifier's ids of the draft tokens, ascending, int64 [D]; None where the vocabularies are the
            same.
        max_depth: Most tokens that it can draft one behind the other; None where there is no such bound.
    """

    root: Tensor
    draft_ids: Tensor | None = None
    max_depth: int | None = None

    def begin(self, tokens: Tensor) -> None:  # noqa: B027  (most drafts need nothing of it)
        """Take in the first token of each sequence, x_0, before anything else; ``commit`` brings those after it.

        Args:
            tokens: The verifier's ids, int64 [B].
        """

    @abstractmethod
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Take in what the verifier has decided since the last round, and forget the nodes of that round.

        Args:
            tokens: The token *after* each newly processed one, the verifier's ids, int64 [B, Q]. For a sequence
                x_0 .. x_n of which the verifier has processed the first n tokens: those up to x_n.
            features: The verifier's states at the processed tokens, [B, Q, ...]: the one before each of ``tokens``.
            counts: How many of the Q are real in each row; the others stand behind them, int64 [B].
        """

    @abstractmethod
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Draft on behind some nodes.

        Nodes are numbered in each row in the order of the calls, from 0.

        Args:
            tokens: The token of each node, the verifier's ids, int64 [B, W].
            parents: The node that each stands behind, int64 [B, W]; -1 is the root.

        Returns:
            Logits of the token that follows each node, [B, W, D].
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences, int64 [rows]; a ``commit`` follows before anything else."""

    def to_verifier(self, tokens: Tensor) -> Tensor:
        """Translate draft tokens [...] to the verifier's ids."""
        return tokens if self.draft_ids is None else self.draft_ids[tokens]
