"""Attention of a verifier over packed rows, document by document: no mask, which would grow with the row's square.

Only captures use it; everything else that runs the verifier attends as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specforge import flash
from specforge.documents import DocumentAttention, DocumentLayout
from specforge.private.transformers import attention_of

IMPLEMENTATION = "specforge_documents"

# Of the capture that runs in this thread: others may decode with the same verifier meanwhile.
_documents: ContextVar[DocumentAttention | None] = ContextVar("documents", default=None)


def attend_by_documents(verifier: PreTrainedModel) -> None:
    """Let a verifier attend so during captures, if its layers see all that is before them, or the last so many tokens.

    Args:
        verifier: Is changed; one that attends in another way is unchanged, and its packed rows use masks.
    """
    config = verifier.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    by_sdpa = verifier.is_backend_compatible() and attention_of(config) == "sdpa"
    if by_sdpa and kinds <= {"full_attention", "sliding_attention"}:
        verifier.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def attending_to(documents: DocumentLayout, device: torch.device) -> Iterator[None]:
    """Attend within documents in this thread, on a device."""
    token = _documents.set(documents.on(device))
    try:
        yield
    finally:
        _documents.reset(token)


def document_numbers(position_ids: Tensor) -> Tensor:
    """Number the documents of rows, [B, T]; one begins wherever positions, [B, T], do not increase by 1."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0)).cumsum(1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    documents = _documents.get()
    if documents is None:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **options
        )
        return found
    if documents.ends is not None and flash.takes(query):
        # Documents follow each other, so that nothing is gathered. Padding attends to itself; nothing reads it.
        flat_query, flat_key, flat_value = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
        ends = documents.ends
        output, _ = flash.attend(flat_query, flat_key, flat_value, ends, ends, scaling, sliding_window)
        return output.unflatten(0, query.shape[:1] + query.shape[2:3]), None
    attend = partial(causal_attention, scale=scaling, window=sliding_window)
    return documents.attend(attend, query, key, value).transpose(1, 2), None


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    mask: Tensor | None = None if _documents.get() is not None else sdpa_mask(*arguments, **options)
    return mask


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attend causally.

    Args:
        query: [G, heads, L, D].
        key: [G, key-value heads, L, D].
        value: [G, key-value heads, L, D].
        scale: Factor of the logits; None for 1 / sqrt(D).
        window: A row sees only the last so many, itself included; None for all.

    Returns:
        [G, heads, L, D].
    """
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    groups, _, length, _ = query.shape
    if window is None or window >= length:
        return attend(query, key, value, is_causal=True)
    # In blocks of a window's length, each of which sees itself and the one before: no more than 2 windows a row.
    blocks = -(-length // window)
    rest = blocks * window - length
    queries = F.pad(query, (0, 0, 0, rest)).unflatten(2, (blocks, window))
    keys, values = (
        F.pad(one, (0, 0, window, rest)).unfold(2, 2 * window, window).transpose(-1, -2) for one in (key, value)
    )
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)
    near = (column > row) & (column <= row + window)
    real = (column >= window) | (torch.arange(blocks, device=query.device) > 0)[:, None]
    mask = (near & real[:, None]).repeat(groups, 1, 1)[:, None]
    queries, keys, values = (one.transpose(1, 2).flatten(0, 1) for one in (queries, keys, values))
    output = attend(queries, keys, values, attn_mask=mask)
    return output.unflatten(0, (groups, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
