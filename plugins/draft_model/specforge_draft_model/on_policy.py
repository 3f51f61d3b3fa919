"""Text that the draft generates during training (on-policy distillation, https://arxiv.org/abs/2310.08461).

In decoding, a draft continues its own tokens, which are not always the verifier's. In some batches it therefore
generates a span of each document, and is trained towards the verifier's distributions over that text. A span replaces
the same number of response tokens, so the rest of the batch does not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge.bounds import Amount, Count, Portion
from specforge.data.host_masks import HostMasks
from specforge.sampling import RandomSource, Sampling
from specforge_draft_model.model import DraftModel


class OnPolicySettings(BaseModel):
    """What the draft writes itself, and in how many batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: Portion = Field(default=0.5, gt=0, description="Share of the training batches that the draft writes in.")
    new_tokens: Count = Field(
        default=32, le=4096, description="Tokens that it writes in each document, at most to the end of a response."
    )
    temperature: Amount = Field(default=1.0, description="Temperature of the draft; 0 takes its most probable tokens.")

    def chooses(self, batch: int) -> bool:
        """Tell whether the draft writes in a batch, by its number in the run: evenly spread over all batches."""
        return int((batch + 1) * self.share) > int(batch * self.share)


@torch.no_grad()
def rewritten(draft: DraftModel, batch: Mapping[str, Tensor], settings: OnPolicySettings, seed: int) -> Tensor:
    """Let the draft generate a span of a response in each document, from a random token on.

    Args:
        draft: The draft.
        batch: ``input_ids``, ``loss_mask`` and ``document_ids``, [B, T] each.
        settings: How many tokens, and how they are sampled.
        seed: Seed of everything random.

    Returns:
        The tokens with those of the draft in them, int64 [B, T].
    """
    tokens = batch["input_ids"]
    masks = HostMasks.of(batch).masks
    spans = _spans(masks["loss_mask"], masks["document_ids"], settings.new_tokens, seed)
    if not spans:
        return tokens
    prompts = [tokens[row, begin:at] for row, begin, at, _ in spans]
    rng = RandomSource(torch.Generator(tokens.device).manual_seed(seed))
    longest = max(end - at for _, _, at, end in spans)
    written = continued(draft, prompts, longest, Sampling(temperature=settings.temperature), rng)
    found = tokens.clone()
    for (row, _, at, end), own in zip(spans, written, strict=True):
        found[row, at:end] = own[: end - at]
    return found


@torch.no_grad()
def continued(draft: DraftModel, prompts: list[Tensor], number: int, sampling: Sampling, rng: RandomSource) -> Tensor:
    """Let a draft continue prompts.

    Args:
        draft: The draft.
        prompts: Tokens of each of B prompts, int64 [T] each.
        number: Number of tokens to write.
        sampling: How they are chosen.
        rng: Source of randomness.

    Returns:
        int64 [B, number].
    """
    lengths = torch.tensor([len(one) for one in prompts], device=prompts[0].device)
    drafter = draft.drafter(len(prompts))
    drafter.read(pad_sequence(prompts, batch_first=True), lengths)
    written = [sampling.choose(drafter.root, rng)]
    for parent in range(-1, number - 2):
        logits = drafter.step(written[-1][:, None], torch.full_like(lengths, parent)[:, None])
        written.append(sampling.choose(logits[:, 0], rng))
    return torch.stack(written, dim=1)


def _spans(loss_mask: Tensor, document_ids: Tensor, new_tokens: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Choose what the draft writes of each document that has a response.

    Returns:
        Row, and the indices in it at which the document, the span and the text after it begin.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row, (mask, documents) in enumerate(zip(loss_mask, document_ids, strict=True)):
        for document in documents[documents >= 0].unique():
            own = (documents == document).nonzero()[:, 0]
            begin, after = int(own[0]), int(own[-1]) + 1
            # The draft cannot begin without a token.
            starts = begin + 1 + mask[begin + 1 : after].nonzero()[:, 0]
            if not len(starts):
                continue
            at = int(starts[torch.randint(len(starts), (), generator=generator)])
            others = (~mask[at:after]).nonzero()[:, 0]
            end = at + int(others[0]) if len(others) else after
            found.append((row, begin, at, min(end, at + new_tokens)))
    return found
