"""The verifier in decoding: forward passes over trees of tokens, with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specforge.decoding.checks import context_length
from specforge.errors import UsageError
from specforge.models.draft_attention import cache_argument
from specforge.models.tree_cache import TreeCache
from specforge.private.transformers import attention_of, is_recurrent
from specforge.verifier.features import Features, capture, name_of
from specforge.verifier.finite import check_finite
from specforge.verifier.packed_attention import IMPLEMENTATION
from specforge.verifier.parts import decoder

# Attention implementations of transformers that accept any mask.
MASKED = ("sdpa", "eager")
# Rotary embeddings that change as a text grows: earlier keys would have to be recomputed.
GROWING_ROTARY = ("longrope",)


class CachedVerifier:
    """Runs a verifier over sequences that grow by trees.

    Args:
        verifier: Any transformers causal language model whose only state is keys and values.
        aux_layers: Layers whose states the draft reads, ascending.
        batch_size: Number B of sequences.

    Raises:
        UsageError: The verifier has a state that cannot be rolled back, or cannot attend to a tree.
    """

    def __init__(self, verifier: PreTrainedModel, aux_layers: Sequence[int], batch_size: int) -> None:
        self._verifier = verifier
        self._aux_layers = aux_layers
        self._config = verifier.config.get_text_config()
        self._kinds = _attention_kinds(verifier)
        self._context = context_length(verifier)
        self._cache_argument = cache_argument(decoder(verifier).forward)
        self.cache = TreeCache(batch_size, verifier.device)

    def begin(self, tokens: Tensor) -> Features:
        """Process prompts, int64 [B, Q], padded on the right."""
        return self._run(tokens, self.cache.extend(tokens.shape[1]))

    def run(self, tokens: Tensor, parents: Tensor) -> Features:
        """Process a tree of tokens, int64 [B, Q], each after its parent; -1 is the last committed token."""
        return self._run(tokens, self.cache.append(parents))

    def _run(self, tokens: Tensor, index: Tensor) -> Features:
        options: dict[str, Any] = {self._cache_argument: self.cache, "use_cache": True}
        # Padding may be beyond the last learned position.
        positions = index.clamp(max=self._context - 1)
        if not self.cache.is_plain:
            masks = {kind: self._mask(kind) for kind in self._kinds}
            # Models with one kind of layer take one mask, others a mask for each kind.
            options["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        features = capture(self._verifier, tokens, positions, self._aux_layers, **options)
        check_finite(features.last, self._verifier, name_of(self._verifier))
        return features

    def _mask(self, kind: str) -> Tensor:
        window = self._config.sliding_window if kind == "sliding_attention" else None
        chunk = self._config.attention_chunk_size if kind == "chunked_attention" else None
        visible = self.cache.visible(window, chunk)
        assert visible is not None
        # Additive masks work with every implementation. A finite minimum, since -inf makes a fully masked row NaN.
        hidden = torch.finfo(self._verifier.dtype).min
        return torch.zeros_like(visible, dtype=self._verifier.dtype).masked_fill(~visible, hidden)[:, None]


def why_no_trees(verifier: PreTrainedModel) -> str | None:
    """Return why a verifier cannot verify trees of drafted tokens; None if it can."""
    config = verifier.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    unknown = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if unknown or is_recurrent(verifier):
        what = f"layers of {', '.join(unknown)}" if unknown else "a recurrent state"
        return f"it has {what}, so rejected tokens cannot be rolled back"
    if rotary in GROWING_ROTARY:
        return f"its {rotary} rotary embeddings change as a text grows"
    if not verifier.is_backend_compatible():
        return "it does not use transformers' attention interface, which takes a tree mask"
    return None


def _attention_kinds(verifier: PreTrainedModel) -> list[str]:
    """Return the kinds of attention in a verifier's layers; reject kinds that decoding cannot run correctly."""
    config = verifier.config.get_text_config()
    name = type(verifier).__name__
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if not kinds:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    reason = why_no_trees(verifier)
    if reason is not None:
        raise UsageError(f"{name} cannot verify drafts: {reason}")
    implementation = attention_of(config)
    if implementation not in (*MASKED, IMPLEMENTATION):
        raise UsageError(
            f"{name} is loaded with attn_implementation={implementation!r}, which cannot attend to a tree of "
            f"candidates; load it with one of: {', '.join(MASKED)}"
        )
    return kinds
