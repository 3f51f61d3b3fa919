"""Facts about a verifier that formats need, small enough to be stored with a draft."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from specforge.errors import UsageError
from specforge.models.base_components import plain_rope
from specforge.verifier.fingerprint import fingerprint
from specforge.verifier.loading import VerifierLoading, load_config


class VerifierFacts(BaseModel):
    """Properties of a verifier that a draft's configuration has to match.

    Attributes:
        name_or_path: Folder or hub id.
        fingerprint: Identifies the verifier; None if its weights cannot be read.
        hidden_size: Width H.
        vocab_size: Number V of tokens.
        num_hidden_layers: Number N of decoder layers.
        max_position_embeddings: Maximum length of a text; None if not set.
        rope: Parameters of its rotary embeddings in full attention, as far as drafts support them.
    """

    model_config = ConfigDict(frozen=True)

    name_or_path: str
    fingerprint: str | None
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int | None
    rope: dict[str, Any]

    @classmethod
    def read(cls, name_or_path: str, loading: VerifierLoading | None = None) -> Self:
        """Read the facts of the verifier in a folder or on the hub.

        Raises:
            UsageError: There is no such verifier.
        """
        loading = loading or VerifierLoading()
        config = load_config(name_or_path, loading).get_text_config()
        try:
            digest = fingerprint(name_or_path, loading)
        except UsageError:
            digest = None
        return cls(
            name_or_path=name_or_path,
            fingerprint=digest,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_hidden_layers=config.num_hidden_layers,
            max_position_embeddings=getattr(config, "max_position_embeddings", None),
            rope=plain_rope(getattr(config, "rope_parameters", None)),
        )
