"""FlashAttention over sequences of different lengths, by its documentation: slow, and for any dtype and device.

A causal mask is aligned to the ends of a sequence's queries and keys; the window counts from there
(https://github.com/Dao-AILab/flash-attention, "Changelog", 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """Return output [T, heads, D], log-sum-exp [heads, T] and three tensors that no one reads."""
    assert scale is not None and (is_causal or window_size_right == 0) and not dropout_p
    check_sequences(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    output, logsumexp = torch.zeros_like(query), query.new_zeros(query.shape[1::-1], dtype=_wide(query))
    for rows, keys, logits in _sequences(query, key, cum_seq_q, cum_seq_k, scale, window_size_left):
        logsumexp[:, rows] = logits.logsumexp(-1)
        weights = logits.softmax(-1)
        of_heads = _expanded(value[keys], query)
        output[rows] = torch.einsum("hqk,khd->qhd", weights, of_heads.to(weights.dtype)).to(output.dtype)
    return output, logsumexp, *(query.new_zeros(2) for _ in range(3))


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    assert scale is not None
    check_sequences(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    assert logsumexp.is_contiguous() and logsumexp.shape == query.shape[1::-1]
    wide = _wide(query)
    found = [torch.zeros(one.shape, dtype=wide) for one in (query, key, value)]
    for rows, keys, logits in _sequences(query, key, cum_seq_q, cum_seq_k, scale, window_size_left):
        given, own_out, asked = (one[rows].to(wide) for one in (grad_out, out, query))
        weights = (logits - logsumexp[:, rows, None]).exp()
        of_weights = torch.einsum("qhd,khd->hqk", given, _expanded(value[keys], query).to(wide))
        of_logits = weights * (of_weights - (given * own_out).sum(-1).T[:, :, None]) * scale
        found[0][rows] = torch.einsum("hqk,khd->qhd", of_logits, _expanded(key[keys], query).to(wide))
        shared = (len(logits[0, 0]), key.shape[1], -1, key.shape[2])
        found[1][keys] += torch.einsum("hqk,qhd->khd", of_logits, asked).reshape(shared).sum(2)
        found[2][keys] += torch.einsum("hqk,qhd->khd", weights, given).reshape(shared).sum(2)
    of_query, of_key, of_value = (one.to(like.dtype) for one, like in zip(found, (query, key, value), strict=True))
    return of_query, of_key, of_value


def check_sequences(query: Tensor, key: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int) -> None:
    """Check what the kernel demands, and does not check on a GPU."""
    for ends, longest, tensor in ((cum_seq_q, max_q, query), (cum_seq_k, max_k, key)):
        lengths = ends.diff()
        assert ends.dtype == torch.int32 and ends.tolist()[0] == 0 and ends.tolist()[-1] == len(tensor)
        assert lengths.tolist() and min(lengths.tolist()) > 0 and max(lengths.tolist()) == longest
    assert all(q <= k for q, k in zip(cum_seq_q.diff().tolist(), cum_seq_k.diff().tolist(), strict=True))


def _sequences(
    query: Tensor, key: Tensor, of_queries: Tensor, of_keys: Tensor, scale: float, window: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield queries, keys and masked logits [heads, Q, L] of each sequence."""
    ends = [[slice(*one) for one in pairwise(every.tolist())] for every in (of_queries, of_keys)]
    for rows, keys in zip(*ends, strict=True):
        wide: Any = _wide(query)
        logits = torch.einsum("qhd,khd->hqk", query[rows].to(wide), _expanded(key[keys], query).to(wide)) * scale
        q, k = logits.shape[1:]
        own = torch.arange(q)[:, None] + k - q
        hidden = torch.arange(k) > own
        if window is not None and window >= 0:
            hidden |= torch.arange(k) < own - window
        yield rows, keys, logits.masked_fill(hidden, float("-inf"))


def _expanded(shared: Tensor, query: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
