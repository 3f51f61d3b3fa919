"""The frozen verifier of a run (whole, split over the processes, or only its parts), and its states over a batch.

States are computed, read from the store, or computed and recorded for later. The caller does not see the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specforge.data.features.dtypes import decode
from specforge.data.features.manifest import FeatureNeeds
from specforge.data.features.recording import FeatureRecorder
from specforge.documents import DocumentLayout
from specforge.training.totals import processes, total
from specforge.verifier.features import Features, capture, check_documents, check_logits
from specforge.verifier.fingerprint import fingerprint
from specforge.verifier.finite import check_finite
from specforge.verifier.loading import VerifierLoading, load_config, load_verifier
from specforge.verifier.parts import VerifierParts
from specforge.verifier.sharding import load_sharded_verifier


class FrozenVerifier:
    """The verifier that a draft is trained for. It is not a module, so it is never trained, sharded or saved.

    Args:
        name: Folder or hub id.
        loading: Dtype, revision and trust.
        sharding: Whether to split its layers over all processes.

    Attributes:
        config: Its transformers configuration.
        recorder: Stores the computed states; None if they are not stored.
    """

    def __init__(self, name: str, loading: VerifierLoading, sharding: bool = False) -> None:
        self.name = name
        self.loading = loading
        self.sharding = sharding
        self.config = load_config(name, loading)
        self.recorder: FeatureRecorder | None = None
        self._held: tuple[PreTrainedModel | None, VerifierParts] | None = None

    @property
    def stored_name(self) -> str:
        """Its name in checkpoints: a hub id or an absolute folder."""
        folder = Path(self.name)
        return str(folder.absolute()) if folder.is_dir() else self.name

    @property
    def is_held(self) -> bool:
        """Whether the model or its parts are loaded."""
        return self._held is not None

    @property
    def whole(self) -> PreTrainedModel | None:
        """The whole model; None if only its parts, or nothing yet, are loaded."""
        return self._held[0] if self._held else None

    @property
    def model(self) -> PreTrainedModel:
        """The whole model, which must be loaded."""
        assert self.whole is not None
        return self.whole

    @property
    def parts(self) -> VerifierParts:
        """Its embeddings, norm and head, which must be loaded."""
        assert self._held is not None
        return self._held[1]

    def needs(self, aux_layers: list[int], whole_rows: bool, row_ends: bool) -> FeatureNeeds:
        """Return which of its states are read; the fingerprint opens all of its files.

        Args:
            aux_layers: Ids of the layers that features are taken from, ascending.
            whole_rows: Whether states after a row's last supervised token are read.
            row_ends: Whether the states of that token and of the one after it are read.
        """
        text = self.config.get_text_config()
        mark = fingerprint(self.name, self.loading)
        width = text.hidden_size
        return FeatureNeeds(self.name, mark, tuple(aux_layers), text.num_hidden_layers, width, whole_rows, row_ends)

    def load(self, device: torch.device | None, whole: bool = True, packing: bool = False) -> None:
        """Load the model, or only its parts.

        Args:
            device: Target device; torch's default device if None.
            whole: Whether the whole model is needed, to compute states or generate text.
            packing: Whether rows hold several documents.

        Raises:
            UsageError: It cannot be loaded, or cannot be run as required.
        """
        if not whole:
            parts = VerifierParts.from_pretrained(self.name, self.loading)
            for part in (parts.embed_tokens, parts.norm, parts.lm_head):
                part.to(device)
            self.hold(None, parts)
            return
        if self._is_split:
            assert device is not None
            model = load_sharded_verifier(self.name, self.loading, device)
        else:
            model = load_verifier(self.name, self.loading, device)
        check_logits(model)
        if packing and self._is_split:
            check_documents(model)
        self.hold(model, VerifierParts.of(model))

    def hold(self, model: PreTrainedModel | None, parts: VerifierParts) -> None:
        """Use a model that is already loaded.

        Args:
            model: The whole model; None if all its states are stored.
            parts: Its embeddings, norm and head.
        """
        self._held = model, parts

    def states(
        self, batch: Mapping[str, Any], aux_layers: list[int], documents: DocumentLayout | None = None
    ) -> Features:
        """Return its states over a batch: stored with the batch, or else computed.

        Args:
            batch: ``input_ids`` and ``position_ids``, [B, T] each, and optionally stored states.
            aux_layers: Ids of the layers that features are taken from, ascending.
            documents: The documents of the batch (see ``specforge.verifier.features.capture``).
        """
        computed = self._computed(batch, aux_layers, documents) if self._runs_on(batch) else None
        if computed is not None and "last" not in batch:
            return computed
        dtype = self.parts.lm_head.weight.dtype
        aux = decode(batch["aux"], batch.get("aux_scales"), dtype)
        return Features(aux, decode(batch["last"], batch.get("last_scales"), dtype))

    def check(self, features: Features) -> None:
        """Check that the verifier is not the cause of a non-finite loss.

        Args:
            features: Its states over a batch with such a loss.

        Raises:
            UsageError: It is, because of a damaged weight or an overflowing dtype.
        """
        if self.whole is not None:
            check_finite(features.last, self.whole, self.name)
            return
        parts = self.parts
        modules = nn.ModuleDict({"embed_tokens": parts.embed_tokens, "norm": parts.norm, "lm_head": parts.lm_head})
        check_finite(parts.logits(features.last), modules, self.name)

    @property
    def _is_split(self) -> bool:
        return self.sharding and processes() > 1

    def _runs_on(self, batch: Mapping[str, Any]) -> bool:
        runs = "last" not in batch
        if self._is_split and self.whole is not None:
            # A process with stored states still runs its share of the layers for processes without.
            return bool(total(torch.tensor(float(runs), device=batch["input_ids"].device)))
        return runs

    def _computed(self, batch: Mapping[str, Any], aux_layers: list[int], documents: DocumentLayout | None) -> Features:
        features = capture(self.model, batch["input_ids"], batch["position_ids"], aux_layers, documents)
        if self.recorder is not None:
            self.recorder.add(batch, features.aux, features.last)
            # Rounded as if read from the store, so that training does not depend on what is recorded already.
            features = Features(self.recorder.rounded(features.aux), self.recorder.rounded(features.last))
        return features
