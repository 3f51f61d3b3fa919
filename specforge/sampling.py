"""How a next token is chosen from logits: greedily, or sampled at a temperature from the top-k and top-p tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor, device, dtype

# Below it, the most probable token has all the probability, and logits over the temperature soon overflow; engines
# choose greedily below the same.
LEAST_TEMPERATURE = 1e-5


class Sampling(BaseModel):
    """Settings of sampling; verifier and draft are both subject to them.

    The filters are those of transformers' ``generate``, in its order: temperature, top-k, top-p.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=0.0, ge=0, description="0, or nearly so, takes the most probable token.")
    top_k: int = Field(default=0, ge=0, description="Sample from the k most probable tokens alone; 0: from all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the fewest tokens that hold this much probability."
    )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, so that nothing is random."""
        return self.temperature < LEAST_TEMPERATURE

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities that tokens are drawn with, [..., V], in float32 or wider; not at temperature 0.

        Args:
            logits: [..., V].
        """
        import torch
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.reshape(-1, wide.shape[-1]) / self.temperature
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return scores.log_softmax(-1).view(logits.shape)

    def choose(self, logits: Tensor, chance: Chance) -> Tensor:
        """Choose a token for each row, int64 [...]; of equally probable ones, greedy choice takes the lowest id.

        Args:
            logits: [..., V].
            chance: Source of randomness.
        """
        return logits.argmax(-1) if self.is_greedy else chance.draw(self.log_probs(logits).exp())


class Chance:
    """Everything random in decoding, in three kinds of draws; a test can enumerate them instead.

    Args:
        generator: Where randomness comes from; the device's own state when None.
    """

    def __init__(self, generator: Generator | None = None) -> None:
        self.generator = generator

    def happens(self, probability: Tensor) -> Tensor:
        """Let events happen with some probability, bool of the same shape."""
        return probability.new_empty(probability.shape).uniform_(generator=self.generator) < probability

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows of a batch; of what is drawn here, nothing belongs to a row."""

    def draw(self, probabilities: Tensor) -> Tensor:
        """Draw one of V for each row of probabilities [..., V], int64 [...]."""
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        drawn = rows.multinomial(1, generator=self.generator)
        return drawn.view(probabilities.shape[:-1])

    def draw_several(self, log_probs: Tensor, number: int) -> Tensor:
        """Draw without replacement, in order, int64 [..., number]; what has no probability comes last.

        Args:
            log_probs: [..., V].
            number: How many to draw, at most V.
        """
        import torch

        # The largest sums of log-probabilities and Gumbel noise are such draws; -log of an exponential is Gumbel.
        noise = torch.empty_like(log_probs, dtype=_widest(log_probs.device)).exponential_(generator=self.generator)
        return (log_probs - noise.log()).topk(number, dim=-1).indices


class RowChance(Chance):
    """Draws for each row by a seed of its own: what a row gets does not depend on those beside it.

    Args:
        seeds: One for each row.
        number: Most draws that there will be.
        device: Where the probabilities lie; the draws are the same on any.
    """

    def __init__(self, seeds: Sequence[int], number: int, device: device) -> None:
        import torch

        super().__init__()
        rows = [torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.double) for seed in seeds]
        self._uniforms = torch.stack(rows).to(_widest(device)).to(device)
        self._drawn = 0

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self._uniforms = self._uniforms[rows]

    def draw(self, probabilities: Tensor) -> Tensor:
        """Draw one of V for each row of probabilities [B, ..., V] with one distribution a row, int64 [B, ...]."""
        import torch

        rows = probabilities.reshape(len(self._uniforms), -1).to(self._uniforms.dtype).cumsum(-1)
        places = self._uniforms[:, self._drawn, None] * rows[:, -1:]
        self._drawn += 1
        # To the right of equal sums: a token without probability is never drawn.
        drawn = torch.searchsorted(rows, places, right=True).clamp(max=rows.shape[-1] - 1)
        return drawn.view(probabilities.shape[:-1])


def _widest(device: device) -> dtype:
    """Return float64, or float32 on Apple's GPUs, which know no more."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64
