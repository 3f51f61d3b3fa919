"""Triton kernels over rows of logits: one program a row, which stays in the cache while it is read several times.

Only ``specforge.training.losses.kernel`` imports this file, when it launches a kernel: Triton comes with the CUDA
builds of torch. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU. A kernel is compiled for each
size of a vocabulary, of which a run has two at most.

Letters in shapes: M pairs of a draft's and a verifier's distribution, R of the latter, D draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a row that a program reads at a time, and its warps: 16 values a thread, which fit into its registers.
BLOCK = 2048
WARPS = 4

LN_2 = tl.constexpr(0.6931471805599453)


def row_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See ``specforge.training.losses.kernel.row_statistics``."""
    rows, size = logits.shape
    normaliser = logits.new_empty(rows, dtype=torch.float32)
    top = logits.new_empty(rows, dtype=torch.int64)
    if rows:
        _row_statistics[(rows,)](logits, normaliser, top, logits.stride(0), size, BLOCK, num_warps=WARPS)
    return normaliser, top


def pair_sums(
    logits: Tensor, verifier: Tensor, normaliser: Tensor, of_draft: Tensor, target_of: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``specforge.training.losses.kernel.pair_sums``."""
    pairs, size = logits.shape
    sums = logits.new_empty(8, pairs, dtype=torch.float32)
    top = logits.new_empty(pairs, dtype=torch.int64)
    if pairs:
        strides = logits.stride(0), verifier.stride(0)
        given = logits, verifier, normaliser, of_draft, target_of
        _pair_sums[(pairs,)](*given, sums, top, *strides, size, pairs, BLOCK, num_warps=WARPS)
    return sums, top


def pair_gradient_(
    logits: Tensor,
    verifier: Tensor,
    normaliser: Tensor,
    of_draft: Tensor,
    target_of: Tensor,
    sums: Tensor,
    tokens: Tensor,
    factors: Tensor,
    used: Sequence[bool],
) -> None:
    """See ``specforge.training.losses.kernel.pair_gradient_``."""
    pairs, size = logits.shape
    if pairs:
        strides = logits.stride(0), verifier.stride(0)
        given = logits, verifier, normaliser, of_draft, target_of, sums, tokens, factors
        _pair_gradient[(pairs,)](*given, *strides, size, pairs, *used, len(tokens) - 2, BLOCK, num_warps=WARPS)


@triton.jit
def _log_sum_exp_and_top(row, size: tl.constexpr, BLOCK: tl.constexpr):
    """Return the log-sum-exp of a row, and the index of its first maximum."""
    most = -float("inf")
    total = 0.0
    top = 0
    for begin in range(0, size, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        logit = tl.load(row + index, mask=index < size, other=-float("inf")).to(tl.float32)
        best = tl.max(logit, 0)
        top = tl.where(best > most, begin + tl.argmax(logit, 0), top)
        largest = tl.maximum(most, best)
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(logit - shift), 0)
        most = largest
    return most + tl.log(total), top


@triton.jit
def _log_middle(log_p, log_q):
    """Return log((p + q) / 2)."""
    return tl.maximum(log_p, log_q) + tl.log(1 + tl.exp(-tl.abs(log_p - log_q))) - LN_2


@triton.jit
def _row_statistics(logits, normaliser, top, stride, size: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp and first maximum of each row."""
    row = tl.program_id(0).to(tl.int64)
    log_sum, best = _log_sum_exp_and_top(logits + row * stride, size, BLOCK)
    tl.store(normaliser + row, log_sum)
    tl.store(top + row, best.to(tl.int64))


@triton.jit
def _pair_sums(
    logits,
    verifier,
    normaliser,
    of_draft,
    target_of,
    sums,
    top,
    stride,
    verifier_stride,
    size: tl.constexpr,
    pairs,
    BLOCK: tl.constexpr,
):
    """The sums of each pair, in two passes over its logits and one over the verifier's."""
    pair = tl.program_id(0).to(tl.int64)
    target = tl.load(target_of + pair)
    draft = logits + pair * stride
    other = verifier + target * verifier_stride
    log_full, log_own = tl.load(normaliser + target), tl.load(of_draft + target)
    log_sum, best = _log_sum_exp_and_top(draft, size, BLOCK)
    forward = 0.0
    cross = 0.0
    reverse = 0.0
    middle_p = 0.0
    middle_q = 0.0
    # The acceptance probability sum_v min(p, q) may underflow, so its logarithm is formed.
    most = -float("inf")
    accepted = 0.0
    smaller = 0.0
    for begin in range(0, size, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        known = index < size
        log_q = tl.load(draft + index, mask=known, other=0.0).to(tl.float32) - log_sum
        logit = tl.load(other + index, mask=known, other=0.0).to(tl.float32)
        log_p, log_p_full = logit - log_own, logit - log_full
        p, q = tl.exp(log_p), tl.exp(log_q)
        forward += tl.sum(tl.where(known, p * (log_p - log_q), 0.0), 0)
        cross -= tl.sum(tl.where(known, p * log_q, 0.0), 0)
        reverse += tl.sum(tl.where(known, q * (log_q - log_p), 0.0), 0)
        log_m = _log_middle(log_p, log_q)
        middle_p += tl.sum(tl.where(known, p * (log_p - log_m), 0.0), 0)
        middle_q += tl.sum(tl.where(known, q * (log_q - log_m), 0.0), 0)
        log_min = tl.where(known, tl.minimum(log_p_full, log_q), -float("inf"))
        largest = tl.maximum(most, tl.max(log_min, 0))
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        own = tl.exp(log_min - shift)
        scale = tl.exp(most - shift)
        accepted = accepted * scale + tl.sum(own, 0)
        smaller = smaller * scale + tl.sum(tl.where(log_q < log_p_full, own, 0.0), 0)
        most = largest
    tl.store(sums + pair, log_sum)
    tl.store(sums + pairs + pair, forward)
    tl.store(sums + 2 * pairs + pair, cross)
    tl.store(sums + 3 * pairs + pair, reverse)
    tl.store(sums + 4 * pairs + pair, (middle_p + middle_q) / 2)
    tl.store(sums + 5 * pairs + pair, most + tl.log(accepted))
    tl.store(sums + 6 * pairs + pair, middle_q)
    tl.store(sums + 7 * pairs + pair, smaller / accepted)
    tl.store(top + pair, best.to(tl.int64))


@triton.jit
def _pair_gradient(
    logits,
    verifier,
    normaliser,
    of_draft,
    target_of,
    sums,
    tokens,
    factors,
    stride,
    verifier_stride,
    size: tl.constexpr,
    pairs,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    MIDDLE: tl.constexpr,
    ACCEPTANCE: tl.constexpr,
    TEXT: tl.constexpr,
    BEST: tl.constexpr,
    FURTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace each logit by the gradient of the loss.

    With q the softmax of the logits z, the sums of a pair contribute:

    d KL(p || q) / dz = q - p
    d KL(q || p) / dz = q (log q - log p - KL(q || p))
    d JS(p, q) / dz = q (log q - log m - KL(q || m)) / 2
    d log a / dz = (e - q sum e) with e = min(p, q) / a where q is the smaller one, else 0
    d log q(y) / dz = 1 at y - q
    """
    pair = tl.program_id(0).to(tl.int64)
    target = tl.load(target_of + pair)
    draft = logits + pair * stride
    other = verifier + target * verifier_stride
    log_full, log_own = tl.load(normaliser + target), tl.load(of_draft + target)
    log_sum = tl.load(sums + pair)
    for begin in range(0, size, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        known = index < size
        log_q = tl.load(draft + index, mask=known, other=0.0).to(tl.float32) - log_sum
        logit = tl.load(other + index, mask=known, other=0.0).to(tl.float32)
        log_p = logit - log_own
        q = tl.exp(log_q)
        gradient = tl.zeros([BLOCK], dtype=tl.float32)
        if FORWARD:
            gradient += tl.load(factors + pair) * (q - tl.exp(log_p))
        if REVERSE:
            gradient += tl.load(factors + pairs + pair) * q * (log_q - log_p - tl.load(sums + 3 * pairs + pair))
        if MIDDLE:
            from_middle = log_q - _log_middle(log_p, log_q) - tl.load(sums + 6 * pairs + pair)
            gradient += tl.load(factors + 2 * pairs + pair) * q * from_middle / 2
        if ACCEPTANCE:
            share = tl.exp(log_q - tl.load(sums + 5 * pairs + pair))
            own = tl.where(log_q < logit - log_full, share, 0.0) - q * tl.load(sums + 7 * pairs + pair)
            gradient += tl.load(factors + 3 * pairs + pair) * own
        if TEXT:
            is_text = tl.where(index == tl.load(tokens + pair), 1.0, 0.0)
            gradient += tl.load(factors + 4 * pairs + pair) * (is_text - q)
        if BEST:
            is_best = tl.where(index == tl.load(tokens + pairs + pair), 1.0, 0.0)
            gradient += tl.load(factors + 5 * pairs + pair) * (is_best - q)
        for number in range(FURTHER):
            is_token = tl.where(index == tl.load(tokens + (2 + number) * pairs + pair), 1.0, 0.0)
            gradient += tl.load(factors + (6 + number) * pairs + pair) * (is_token - q)
        tl.store(draft + index, gradient.to(logits.dtype.element_ty), mask=known)
