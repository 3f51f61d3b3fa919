"""The manifest of a feature store, and its check against what a run reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from xxhash import xxh3_128

from specforge.bounds import FeatureType
from specforge.config import verifier_difference
from specforge.data.features.dtypes import state_bytes, torch_dtype
from specforge.errors import UsageError
from specforge.files import whole_file

MANIFEST = "manifest.json"
FORMAT = 2
_CONVENTION = (
    "layer k is the residual stream before decoder layer k (transformers' hidden_states[k]); the highest k, the number "
    "of layers, is the output of the last layer before the final norm"
)


@dataclass(frozen=True)
class FeatureNeeds:
    """Which verifier states a run reads.

    Attributes:
        verifier: Name of the verifier, for messages.
        fingerprint: See ``specforge.verifier.fingerprint``.
        aux_layers: Ids of the aux layers, ascending.
        num_layers: Number of decoder layers, also the id of the last state.
        width: Width H of a state.
        whole_rows: Whether states after the last supervised token are read.
        row_ends: Whether the states of the last supervised token and of the one after it are read.
    """

    verifier: str
    fingerprint: str
    aux_layers: tuple[int, ...]
    num_layers: int
    width: int
    whole_rows: bool
    row_ends: bool = True

    @property
    def layers(self) -> list[int]:
        """Ids of all layers to read, ascending."""
        return sorted({*self.aux_layers, self.num_layers})

    def kept(self, lengths: Any, last_supervised: Any) -> Any:
        """Return the number of leading tokens of each row whose states are stored, int64 [rows].

        Some alignments read the state of the token after the last supervised one; none reads further.

        Args:
            lengths: Tokens of each row.
            last_supervised: Index of the last supervised token of each row.
        """
        return lengths if self.whole_rows else (last_supervised + 2).clip(max=lengths)

    def read(self, lengths: Any, last_supervised: Any) -> Any:
        """Return the number of leading tokens of each row whose states this run reads, int64 [rows].

        Most alignments end with the state that predicts the last supervised token. An engine that answers and keeps
        its states has no state of the last token.

        Args:
            lengths: Tokens of each row.
            last_supervised: Index of the last supervised token of each row.
        """
        kept = self.kept(lengths, last_supervised)
        return kept if self.whole_rows or self.row_ends else np.minimum(kept, last_supervised)


@dataclass(frozen=True)
class Shard:
    """One file of a store.

    Attributes:
        file: File name.
        rows: Number of rows.
        tokens: Number of tokens with stored states.
        bytes: File size.
        checksum: Checksum of its index, which holds the checksums of its rows.
    """

    file: str
    rows: int
    tokens: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a feature store.

    Attributes:
        verifier: Name of the verifier.
        fingerprint: See ``specforge.verifier.fingerprint``.
        tokenizer: Digest of its tokenizer and chat template; None if it has none.
        vocabulary_size: Size of its vocabulary.
        layers: Ids of the stored layers, ascending; the last is the number of decoder layers.
        width: Width H of a state.
        dtype: Type of the stored values.
        whole_rows: Whether states of whole rows are stored, or only up to one token after the last supervised one.
        rows_identity: Digest of the rows, their order and their split into shards.
        shards: The files.
    """

    verifier: str
    fingerprint: str
    tokenizer: str | None
    vocabulary_size: int
    layers: list[int]
    width: int
    dtype: FeatureType
    whole_rows: bool
    rows_identity: str = ""
    shards: tuple[Shard, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the content of a shard depends on; it is stored in each shard."""
        values = asdict(replace(self, shards=()))
        return {"format": FORMAT, **{name: one for name, one in values.items() if name not in ("verifier", "shards")}}

    @property
    def name(self) -> str:
        """A short digest of the identity, used as a folder name."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def token_bytes(self) -> int:
        """Bytes per token: its states at all layers, with their scales."""
        return len(self.layers) * state_bytes(self.width, torch_dtype(self.dtype))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a store.

        Raises:
            UsageError: The manifest is missing, damaged or of another format.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise UsageError(
                    f"{path} was written by another version of specforge, in another format; run the command that "
                    "wrote it again to capture the features again"
                )
            if values.pop("checksum") != _checksum(values):
                raise ValueError("its checksum is wrong")
            del values["convention"]
            return cls(**{**values, "shards": tuple(Shard(**one) for one in values["shards"])})
        except FileNotFoundError:
            started = any(folder.glob("shard-*"))
            what = "is not finished; run its command again to resume" if started else "is not a feature store"
            raise UsageError(f"{folder} {what} (it has no {MANIFEST})") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: {error}; remove it and run the command that wrote it again") from None

    def write(self, folder: Path) -> None:
        """Write the manifest, which marks the store as complete."""
        values = {"convention": _CONVENTION, **asdict(self)}
        whole = {"format": FORMAT, **values, "checksum": _checksum(values)}
        with whole_file(folder / MANIFEST) as file:
            file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")

    def require(self, needs: FeatureNeeds, tokenizer: str | None, where: str) -> None:
        """Refuse a run that needs states which this store lacks.

        Args:
            needs: What the run reads.
            tokenizer: Digest of its tokenizer and chat template; None if unknown.
            where: Configuration key and folder, for the message.

        Raises:
            UsageError: Names what the store holds and what the run needs.
        """
        if self.fingerprint != needs.fingerprint:
            raise UsageError(
                f"{where} holds states of another verifier: {self.verifier} ({self.fingerprint}), not "
                f"{needs.verifier} ({needs.fingerprint}): {verifier_difference(self.fingerprint, needs.fingerprint)}; "
                "prepare features of this verifier, or set data.features: live"
            )
        if None not in (tokenizer, self.tokenizer) and tokenizer != self.tokenizer:
            raise UsageError(
                f"{where} was captured with another tokenizer or chat template ({self.tokenizer}) than that of "
                f"{needs.verifier} ({tokenizer}); prepare features again, or set data.features: live"
            )
        if missing := [layer for layer in needs.layers if layer not in self.layers]:
            raise UsageError(
                f"{where} lacks layers {missing} (it has {self.layers}); prepare features with the same "
                "configuration, or choose among the stored aux layers"
            )
        if needs.whole_rows and not self.whole_rows:
            raise UsageError(
                f"{where} holds rows up to their last supervised token, but this configuration trains on whole rows; "
                "prepare features with the same configuration"
            )


def _checksum(values: Mapping[str, Any]) -> str:
    return xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe_layers(layers: Sequence[int]) -> str:
    """Return a readable description of the layers."""
    *aux, last = layers
    return f"aux layers {aux} and the last state ({last})" if aux else f"the last state ({last})"
