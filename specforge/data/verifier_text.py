"""What rows need of a verifier: its tokenizer and the number of its ids. Neither needs its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class VerifierText:
    """A verifier's text side, loaded when first needed.

    Attributes:
        name: hub name or folder.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether to run code that comes with it.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; rows of tokens do without.

        Raises:
            UsageError: it cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # hub, parsing and remote code each raise their own classes
            raise self._not_loaded("tokenizer", error) from error

    @cached_property
    def vocabulary_size(self) -> int:
        """Number of ids, V.

        Raises:
            UsageError: config.json cannot be loaded.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # as above
            raise self._not_loaded("config.json", error) from error
        return int(config.get_text_config().vocab_size)

    def _not_loaded(self, part: str, error: Exception) -> UsageError:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return UsageError(f"verifier: the {part} of {self.name} cannot be loaded: {reason}")
