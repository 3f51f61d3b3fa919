"""How a next token is chosen from logits: greedily, or sampled at a temperature from the top-k and top-p tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor, device, dtype

# Below this temperature the most probable token has all the probability, and logits / temperature soon overflow;
# engines switch to greedy decoding at the same value.
LEAST_TEMPERATURE = 1e-5


class Sampling(BaseModel):
    """Sampling settings, used for both verifier and draft.

    The filters are those of transformers' ``generate``, in its order: temperature, top-k, top-p.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=0.0, ge=0, description="0 or nearly 0 takes the most probable token.")
    top_k: int = Field(default=0, ge=0, description="Sample only from the k most probable tokens; 0: from all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the fewest tokens that hold this much probability."
    )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < LEAST_TEMPERATURE

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of sampling, [..., V], in float32 or wider; undefined at temperature 0.

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

    def choose(self, logits: Tensor, rng: RandomSource) -> Tensor:
        """Choose a token for each row, int64 [...]; the greedy choice breaks ties by the lowest id.

        Args:
            logits: [..., V].
            rng: Source of randomness.
        """
        return logits.argmax(-1) if self.is_greedy else rng.categorical(self.log_probs(logits).exp())


class RandomSource:
    """Source of all randomness in decoding: three kinds of draws, which a test can enumerate instead.

    Args:
        generator: The random generator; the device's default one when None.
    """

    def __init__(self, generator: Generator | None = None) -> None:
        self.generator = generator

    def bernoulli(self, probability: Tensor) -> Tensor:
        """Return True with the given probabilities, bool of the same shape."""
        return probability.new_empty(probability.shape).uniform_(generator=self.generator) < probability

    def keep_rows(self, rows: Tensor) -> None:
        """Continue with only these rows of the batch; nothing to do here, since this source has no state per row."""

    def categorical(self, probabilities: Tensor) -> Tensor:
        """Draw one of V for each row of probabilities [..., V], int64 [...]."""
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        drawn = rows.multinomial(1, generator=self.generator)
        return drawn.view(probabilities.shape[:-1])

    def draw_without_replacement(self, log_probs: Tensor, number: int) -> Tensor:
        """Draw without replacement, in order, int64 [..., number]; indices of probability 0 come last.

        Args:
            log_probs: [..., V].
            number: Number of draws, at most V.
        """
        import torch

        # The top-k of log-probabilities plus Gumbel noise are such draws; -log of an exponential is Gumbel.
        noise = torch.empty_like(log_probs, dtype=_widest(log_probs.device)).exponential_(generator=self.generator)
        return (log_probs - noise.log()).topk(number, dim=-1).indices


class RowRandomSource(RandomSource):
    """Random source with one seed per row, so that a row's draws do not depend on the rest of the batch.

    Args:
        seeds: One for each row.
        number: Maximum number of draws.
        device: Device of the probabilities; the draws are the same on any.
    """

    def __init__(self, seeds: Sequence[int], number: int, device: device) -> None:
        import torch

        super().__init__()
        rows = [torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.double) for seed in seeds]
        self._uniforms = torch.stack(rows).to(_widest(device)).to(device)
        self._drawn = 0

    def keep_rows(self, rows: Tensor) -> None:
        """Continue with only these rows."""
        self._uniforms = self._uniforms[rows]

    def categorical(self, probabilities: Tensor) -> Tensor:
        """Draw one of V for each row of probabilities [B, ..., V], one distribution per row; int64 [B, ...]."""
        import torch

        rows = probabilities.reshape(len(self._uniforms), -1).to(self._uniforms.dtype).cumsum(-1)
        thresholds = self._uniforms[:, self._drawn, None] * rows[:, -1:]
        self._drawn += 1
        # To the right of equal sums: a token of probability 0 is never drawn.
        drawn = torch.searchsorted(rows, thresholds, right=True).clamp(max=rows.shape[-1] - 1)
        return drawn.view(probabilities.shape[:-1])


def _widest(device: device) -> dtype:
    """Return float64, or float32 on Apple GPUs, which have no wider type."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64
