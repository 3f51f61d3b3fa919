"""Texts of the validation rows, with the tokens that the draft would have drafted.

Validation replays decoding on recorded text, so it is known without decoding which tokens of a greedy chain would be
accepted (see ``specforge.decoding.replay``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from specforge.data.module import data_of
from specforge.data.text.showing import spans
from specforge.decoding.replay import find_turns
from specforge.errors import UsageError
from specforge.training.attached import is_fitting
from specforge.training.callbacks.board.writers import writers
from specforge.training.losses.distillation import DraftSteps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 2
PROMPT_TOKENS, RESPONSE_TOKENS = 40, 120  # maximum shown of each


class Source(Enum):
    """Where a token of a sample comes from."""

    PROMPT = "prompt"
    DRAFT = "draft"
    VERIFIER = "verifier"


@dataclass(frozen=True)
class Sample:
    """A turn of a text, divided into rounds of decoding.

    Attributes:
        prompt: Last tokens before the response.
        response: The response's tokens.
        rounds: Number of drafted tokens that each round accepts; the verifier's own token follows them.
        steps: Maximum number of tokens that a round drafts.
    """

    prompt: list[int]
    response: list[int]
    rounds: list[int]
    steps: int

    @property
    def sources(self) -> list[Source]:
        """Source of each token of the response; the first comes from the prompt's forward pass."""
        drafted = [[Source.DRAFT] * accepted + [Source.VERIFIER] for accepted in self.rounds]
        return [Source.VERIFIER, *(source for one in drafted for source in one)]


class SampleTexts(Callback):
    """Shows a few texts at each validation, accepted tokens marked.

    Args:
        texts: Number of texts, always the same ones.
    """

    def __init__(self, texts: int = SAMPLES) -> None:
        self.texts = texts
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._shown = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the tokenizer; nothing is shown without one, which is possible if rows hold tokens."""
        if writers(trainer):
            try:
                self._tokenizer = data_of(trainer).tokenizer
            except UsageError:
                self._tokenizer = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the first text."""
        self._shown = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the texts of the batch until enough are shown."""
        if self._tokenizer is None or outputs is None or not is_fitting(trainer) or self._shown >= self.texts:
            return
        for sample in samples_of(batch, outputs["draft_steps"], self.texts - self._shown):
            text = to_markdown(sample, self._tokenizer)
            for writer in writers(trainer):
                writer.add_text(f"val/sample_{self._shown}", text, trainer.global_step)
            self._shown += 1


def samples_of(batch: Mapping[str, Tensor], outcome: DraftSteps, most: int) -> list[Sample]:
    """Return the first turn of each of the first documents.

    Args:
        batch: ``input_ids``, ``document_ids`` and ``position_ids``, [B, T] each.
        outcome: The draft's validation results on it.
        most: Maximum number of samples to return.
    """
    shape = batch["input_ids"].shape
    reachable = outcome.supervised[0].view(shape)
    starts, lengths = find_turns(reachable)
    samples: dict[tuple[int, int], Sample] = {}
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        row, column = divmod(start, shape[1])
        document = row, int(batch["document_ids"][row, column])
        if document in samples:
            continue
        if len(samples) == most:
            break
        first = column + 1  # the round at row t starts after token t + 1
        begin = column - int(batch["position_ids"][row, column])
        tokens = batch["input_ids"][row]
        matches = outcome.matches[:, start : start + length]
        samples[document] = Sample(
            tokens[max(begin, first - PROMPT_TOKENS) : first].tolist(),
            tokens[first : first + length + 1].tolist(),
            accepted_by_round(matches),
            len(matches),
        )
    return list(samples.values())


def accepted_by_round(matches: Tensor) -> list[int]:
    """Follow the rounds of greedy chains through one turn.

    Args:
        matches: Whether step i at anchor j drafts the text's token, [S, N].

    Returns:
        Accepted tokens of each round; with one verifier token per round, they add up to the turn's N tokens.
    """
    anchors = matches.shape[1]
    agreeing = matches.cumprod(0).sum(0).long()
    left = torch.arange(anchors - 1, -1, -1, device=matches.device)  # the last token is the verifier's own
    accepted = torch.minimum(agreeing, left).tolist()
    rounds, anchor = [], 0
    while anchor < anchors:
        rounds.append(accepted[anchor])
        anchor += accepted[anchor] + 1
    return rounds


def to_markdown(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a sample as Markdown for TensorBoard: accepted drafted tokens bold, the prompt in italics.

    Args:
        sample: The sample.
        tokenizer: The verifier's tokenizer.
    """
    tokens, rounds = len(sample.response) - 1, len(sample.rounds)
    heading = (
        f"**{tokens / rounds:.2f} tokens per verifier forward pass**: {tokens} tokens in {rounds} rounds that draft "
        f"{sample.steps}. Bold tokens were drafted and accepted; each plain one took a forward pass."
    )
    return "\n\n".join([heading, "".join(_marked(sample, tokenizer))])


def _marked(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    shown = sample.response[:RESPONSE_TOKENS]
    sources: list[Any] = [Source.PROMPT] * len(sample.prompt) + sample.sources[: len(shown)]
    tags = {Source.PROMPT: ("<em>", "</em><br>"), Source.DRAFT: ("<strong>", "</strong>"), Source.VERIFIER: ("", "")}
    for text, source in spans(sample.prompt + shown, sources, tokenizer):
        opening, closing = tags[source]
        yield f"{opening}{_escaped(text)}{closing}"
    if len(shown) < len(sample.response):
        yield " …"


def _escaped(text: str) -> str:
    """Escape a text so that neither Markdown nor HTML interprets it."""
    return "".join("↵<br>" if one == "\n" else one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in text)
