"""Language models in decoding: forward passes over trees of tokens, with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

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
States = TypeVar("States")


class CachedModel(ABC, Generic[States]):
    """Runs a causal language model over sequences that grow by trees: a verifier, or a draft that is one.

    Args:
        model: Any transformers causal language model whose only state is keys and values.
        batch_size: Number B of sequences.

    Raises:
        UsageError: The model has a state that cannot be rolled back, or cannot attend to a tree.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        self.model = model
        self._config = model.config.get_text_config()
        self._kinds = _attention_kinds(model)
        self._context = context_length(model)
        self._cache_argument = cache_argument(decoder(model).forward)
        self.cache = TreeCache(batch_size, model.device)

    def begin(self, tokens: Tensor) -> States:
        """Process tokens that follow the committed ones, such as a prompt, int64 [B, Q], padded on the right."""
        return self._run(tokens, self.cache.extend(tokens.shape[1]))

    def run(self, tokens: Tensor, parents: Tensor) -> States:
        """Process a tree of tokens, int64 [B, Q], each after its parent; -1 is the last committed token."""
        return self._run(tokens, self.cache.append(parents))

    @abstractmethod
    def states(self, tokens: Tensor, position_ids: Tensor, **options: Any) -> States:
        """Run the model's decoder.

        Args:
            tokens: int64 [B, Q].
            position_ids: int64 [B, Q].
            **options: The cache, and the mask where plain causal attention would not do.
        """

    def _run(self, tokens: Tensor, index: Tensor) -> States:
        options: dict[str, Any] = {self._cache_argument: self.cache, "use_cache": True}
        # Padding may be beyond the last learned position.
        positions = index.clamp(max=self._context - 1)
        if not self.cache.is_plain:
            masks = {kind: self._mask(kind) for kind in self._kinds}
            # Models with one kind of layer take one mask, others a mask for each kind.
            options["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        return self.states(tokens, positions, **options)

    def _mask(self, kind: str) -> Tensor:
        window = self._config.sliding_window if kind == "sliding_attention" else None
        chunk = self._config.attention_chunk_size if kind == "chunked_attention" else None
        visible = self.cache.visible(window, chunk)
        assert visible is not None
        # Additive masks work with every implementation. A finite minimum, since -inf makes a fully masked row NaN.
        hidden = torch.finfo(self.model.dtype).min
        return torch.zeros_like(visible, dtype=self.model.dtype).masked_fill(~visible, hidden)[:, None]


class CachedVerifier(CachedModel[Features]):
    """Runs a verifier.

    Args:
        verifier: The verifier.
        aux_layers: Layers whose states the draft reads, ascending.
        batch_size: Number B of sequences.
    """

    def __init__(self, verifier: PreTrainedModel, aux_layers: Sequence[int], batch_size: int) -> None:
        super().__init__(verifier, batch_size)
        self._aux_layers = aux_layers

    def states(self, tokens: Tensor, position_ids: Tensor, **options: Any) -> Features:
        """Capture what a draft reads, and the last states."""
        features = capture(self.model, tokens, position_ids, self._aux_layers, **options)
        check_finite(features.last, self.model, name_of(self.model))
        return features


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
