"""Stage 2 of the MLP speculator's training: the verifier generates the text that the draft is trained on.

Prompts are cut from a batch of training rows, and the verifier's continuations are the batch that the draft is trained
on. The text depends only on the rows and a seed, so a resumed run trains on the same text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from specforge.bounds import Amount, Count, Width
from specforge.data.loader import Batch
from specforge.data.packing import collate
from specforge.decoding.loop import Decoder
from specforge.errors import UsageError
from specforge.sampling import Sampling


class StageTwoSettings(BaseModel):
    """Start of stage 2, and the verifier's generation in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    begin: Amount = Field(
        default=0.7,
        gt=0,
        description="Start of stage 2: a share of all steps if below 1, otherwise an optimizer step.",
    )
    prompt_length: Count = Field(default=64, description="Length in tokens of the prompts that are cut from the rows.")
    new_tokens: Count = Field(default=256, description="Maximum tokens that the verifier generates per prompt.")
    temperature: Amount = Field(default=1.0, description="Temperature of the verifier.")
    top_k: Width = Field(default=10, description="Sample from the k most probable tokens; 0 for all.")
    buffer: Count = Field(default=2, le=1000, description="Batches that are generated ahead of training.")

    def first_step(self, total_steps: int) -> int:
        """Return the first optimizer step of stage 2 in a run of ``total_steps``."""
        return round(self.begin * total_steps) if self.begin < 1 else int(self.begin)


def cut_prompts(batch: Batch, length: int) -> list[Tensor]:
    """Cut the documents of a batch into prompts.

    Args:
        batch: ``input_ids`` and ``document_ids``, [B, T] each.
        length: Tokens of a prompt. A remainder is dropped, but a shorter document is a prompt by itself.

    Returns:
        Tokens of each prompt, int64 [length] or shorter.
    """
    prompts = []
    for tokens, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for document in documents[documents >= 0].unique():
            pieces = tokens[documents == document].split(length)
            prompts += [piece for piece in pieces if len(piece) == len(pieces[0])]
    return prompts


def generate_batch(
    verifier: PreTrainedModel, prompts: Sequence[Tensor], settings: StageTwoSettings, seed: int
) -> Batch:
    """Generate the verifier's continuations of prompts.

    Args:
        verifier: The verifier; other threads may use it at the same time.
        prompts: Tokens of each prompt, int64 [T] each.
        settings: Settings of the generation.
        seed: Random seed of the sampling.

    Returns:
        A batch with a row for each prompt, in which the verifier's tokens are the response.
    """
    sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k)
    written: list[list[int]] = [[] for _ in prompts]
    for emission in Decoder(verifier, sampling=sampling).decode(prompts, settings.new_tokens, seed):
        written[emission.sequence] += emission.tokens
    return collate([_row(prompt, torch.tensor(tokens)) for prompt, tokens in zip(prompts, written, strict=True)])


def prefetch(make: Callable[[int, Batch], Batch], batches: Iterator[tuple[int, Batch]], buffer: int) -> Iterator[Batch]:
    """Transform numbered batches in a thread, a few ahead of the consumer.

    Args:
        make: Transforms a number and a batch into a new batch; its exceptions are raised here.
        batches: Numbers and batches.
        buffer: Number of batches to prepare ahead.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage-two")
    waiting: deque[Future[Batch]] = deque()
    try:
        for number, batch in batches:
            waiting.append(worker.submit(make, number, batch))
            if len(waiting) > buffer:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        worker.shutdown(cancel_futures=True)


def check_lengths(settings: StageTwoSettings, verifier: PreTrainedConfig) -> None:
    """Refuse prompts and continuations that together exceed the verifier's context.

    Raises:
        UsageError: They exceed it.
    """
    context = getattr(verifier.get_text_config(), "max_position_embeddings", None)
    if context and settings.prompt_length + settings.new_tokens > context:
        raise UsageError(
            f"model.stage_two: prompt_length {settings.prompt_length} and new_tokens {settings.new_tokens} "
            f"exceed the {context:,} tokens of the verifier's context"
        )


def _row(prompt: Tensor, written: Tensor) -> dict[str, Tensor]:
    length = len(prompt) + len(written)
    return {
        "input_ids": torch.cat([prompt.cpu(), written]),
        "loss_mask": torch.arange(length) >= len(prompt),
        "document_ids": torch.zeros(length, dtype=torch.int64),
        "position_ids": torch.arange(length),
    }
