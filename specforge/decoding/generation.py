"""Generation with a draft, with the interface of transformers' ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.decoding.checks import default_stop_tokens
from specforge.decoding.generate_arguments import (
    check_integers,
    check_prompt_ids,
    check_unsupported,
    make_sampling,
    make_verification,
    stop_ids,
)
from specforge.decoding.loop import Decoder, Emission
from specforge.models.generated import Generated
from specforge.models.speculator import SpeculatorModel
from specforge.proposals.choice import choose_proposal

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


def generate(
    draft: SpeculatorModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int | None,
    do_sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    proposal: str | TokenProposalConfig | None,
    verification: str,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    seed: int | None,
    streamer: BaseStreamer | None,
    others: Mapping[str, Any],
) -> Generated:
    """Generate with a draft and its attached verifier; see ``SpeculatorModel.generate``."""
    check_unsupported(others, inspect.signature(SpeculatorModel.generate).parameters)
    verifier = draft.verifier
    if verifier is None:
        raise ValueError("generate needs the whole verifier; call attach_verifier(verifier, mode='full') first")
    check_prompt_ids(input_ids, attention_mask, verifier.config.get_text_config().vocab_size)
    check_integers(max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, seed=seed)
    most = 256 if max_new_tokens is None else max_new_tokens
    if streamer is not None and len(input_ids) != 1:
        raise ValueError(f"a streamer takes one sequence, but there are {len(input_ids)}")
    sampling = make_sampling(do_sample, temperature, top_k, top_p)
    if not isinstance(proposal, str | TokenProposalConfig | None):
        raise TypeError(f'proposal is {proposal!r}; give a name, "NAME:KEY=VALUE,...", or the settings of a method')
    chosen = proposal if isinstance(proposal, TokenProposalConfig) else choose_proposal(proposal, draft.config)
    stop = stop_ids(eos_token_id) or default_stop_tokens(verifier)
    decoder = Decoder(verifier, draft, chosen, sampling, make_verification(verification), stop)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [row[seen.bool()] for row, seen in zip(input_ids, mask, strict=True)]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    emissions: list[list[Emission]] = [[] for _ in prompts]
    for emission in decoder.decode(prompts, most, seed):
        emissions[emission.sequence].append(emission)
        if streamer is not None:
            streamer.put(torch.tensor(emission.tokens))
    if streamer is not None:
        streamer.end()
    new = [[token for one in of_one for token in one.tokens] for of_one in emissions]
    padding = pad_token_id if pad_token_id is not None else _padding(draft, stop)
    width = max(map(len, new), default=0)
    padded = input_ids.new_tensor([tokens + [padding] * (width - len(tokens)) for tokens in new]).view(len(new), width)
    return Generated(
        torch.cat([input_ids, padded], dim=1),
        *_count_rounds([[one.accepted for one in of_one if one.drafted is not None] for of_one in emissions]),
        seconds=decoder.times.prompt + decoder.times.total,
    )


def _count_rounds(accepted: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Count rounds [B], and rounds that accepted at least k = 1 .. K tokens [B, K]."""
    most = max((one for of_one in accepted for one in of_one), default=0)
    reached = [[sum(one >= position for one in of_one) for position in range(1, most + 1)] for of_one in accepted]
    rounds = torch.tensor([len(of_one) for of_one in accepted])
    return rounds, torch.tensor(reached, dtype=torch.int64).view(len(accepted), most)


def _padding(draft: SpeculatorModel, stop: Sequence[int]) -> int:
    assert draft.verifier is not None
    padding = getattr(draft.verifier.generation_config, "pad_token_id", None)
    return padding if padding is not None else next(iter(stop), 0)
