"""The frozen verifier of a run: all of it, split over the processes, or its parts only; and its states over a batch.

States are computed, read where they are stored, or computed and recorded for the next time. Whoever asks for them need
not know which.
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
    """The verifier that a draft is trained towards. It is no module, so that it is never trained, sharded or saved.

    Args:
        name: Folder or hub id.
        loading: Type, revision and trust.
        sharding: Whether to split its layers over all processes.

    Attributes:
        config: Its transformers configuration.
        recorder: Keeps the states that are computed; None where they are not kept.
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
        """What a checkpoint says of it: a hub id, or a folder as it is found from anywhere."""
        folder = Path(self.name)
        return str(folder.absolute()) if folder.is_dir() else self.name

    @property
    def is_held(self) -> bool:
        """Whether it, or its parts, are in memory."""
        return self._held is not None

    @property
    def whole(self) -> PreTrainedModel | None:
        """All of it; None where only its parts are held, or nothing yet."""
        return self._held[0] if self._held else None

    @property
    def model(self) -> PreTrainedModel:
        """All of it, which must be held."""
        assert self.whole is not None
        return self.whole

    @property
    def parts(self) -> VerifierParts:
        """Its embeddings, norm and head, which must be held."""
        assert self._held is not None
        return self._held[1]

    def needs(self, aux_layers: list[int], whole_rows: bool) -> FeatureNeeds:
        """Return what is read of its states; the fingerprint opens all of its files.

        Args:
            aux_layers: Ids of the layers that features are taken from, ascending.
            whole_rows: Whether states after a row's last supervised token are read.
        """
        text = self.config.get_text_config()
        mark = fingerprint(self.name, self.loading)
        return FeatureNeeds(self.name, mark, tuple(aux_layers), text.num_hidden_layers, text.hidden_size, whole_rows)

    def load(self, device: torch.device | None, whole: bool = True, packing: bool = False) -> None:
        """Load it, or its parts.

        Args:
            device: Where to; torch's default device when None.
            whole: Whether all of it is needed, to compute states or to write text.
            packing: Whether its rows will hold several documents.

        Raises:
            UsageError: It cannot be loaded, or not be run as it has to be.
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
        """Take what is loaded already.

        Args:
            model: All of it; None where all its states are stored.
            parts: Its embeddings, norm and head.
        """
        self._held = model, parts

    def states(
        self, batch: Mapping[str, Any], aux_layers: list[int], documents: DocumentLayout | None = None
    ) -> Features:
        """Return its states over a batch: as they are stored with it, or else computed.

        Args:
            batch: ``input_ids`` and ``position_ids``, [B, T] each, and perhaps stored states.
            aux_layers: Ids of the layers that features are taken from, ascending.
            documents: Where the documents are (see ``specforge.verifier.features.capture``).
        """
        computed = self._computed(batch, aux_layers, documents) if self._runs_on(batch) else None
        if computed is not None and "last" not in batch:
            return computed
        dtype = self.parts.lm_head.weight.dtype
        aux = decode(batch["aux"], batch.get("aux_scales"), dtype)
        return Features(aux, decode(batch["last"], batch.get("last_scales"), dtype))

    def check(self, features: Features) -> None:
        """Make sure that it is not the reason for a loss that is not finite.

        Args:
            features: Its states over a batch with such a loss.

        Raises:
            UsageError: It is, because of a damaged weight or a type that overflows.
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
            # A process whose states are stored lends its share of the layers to those whose states are not.
            return bool(total(torch.tensor(float(runs), device=batch["input_ids"].device)))
        return runs

    def _computed(self, batch: Mapping[str, Any], aux_layers: list[int], documents: DocumentLayout | None) -> Features:
        features = capture(self.model, batch["input_ids"], batch["position_ids"], aux_layers, documents)
        if self.recorder is not None:
            self.recorder.add(batch, features.aux, features.last)
            # As they will be read again, so that training does not depend on what has been recorded before.
            features = Features(self.recorder.rounded(features.aux), self.recorder.rounded(features.last))
        return features
