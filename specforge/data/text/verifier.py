"""What rows need of a verifier: its tokenizer and vocabulary size. Neither needs its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from specforge.data.text.template import ChatTemplate


@dataclass
class VerifierTokenizer:
    """A verifier's tokenizer, chat template and vocabulary size, loaded on first use.

    Attributes:
        name: Hub name or folder.
        revision: Branch, tag or commit on the hub; None for the default branch.
        trust_remote_code: Whether to run code shipped with it.
        template_arguments: Extra arguments of its chat template.
        template_date: Date that the template prints as today, such as ``2026-11-29``; None for today.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    template_arguments: Mapping[str, Any] | None = None
    template_date: str | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template with the tokenizer.

        Raises:
            UsageError: The tokenizer cannot be loaded, the date is malformed, or the template ignores an argument.
        """
        from specforge.data.text.template import ChatTemplate

        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise UsageError(f"template_date: {error}; give a day such as 2026-11-29") from None
        source = str(self.tokenizer.chat_template)
        for name in self.template_arguments or {}:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise UsageError(f"template_arguments.{name}: the chat template of {self.name} does not read it")
        return ChatTemplate(self.tokenizer, self.template_arguments, self.template_date, self._end_tokens())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; token rows do not need it.

        Raises:
            UsageError: The tokenizer cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # hub, parsing and remote code each raise their own classes
            raise self._not_loaded("tokenizer", error) from error

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size V.

        Raises:
            UsageError: ``config.json`` cannot be loaded.
        """
        return int(self._config.get_text_config().vocab_size)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # as above
            raise self._not_loaded("config.json", error) from error

    def _end_tokens(self) -> list[str]:
        """Return the texts of the end tokens: those of the generation config and of the tokenizer."""
        from transformers import GenerationConfig

        try:
            settings: Any = GenerationConfig.from_pretrained(self.name, revision=self.revision)
        except Exception:  # without a generation config, use the model's configuration, as transformers does
            settings = self._config.get_text_config()
        ends = getattr(settings, "eos_token_id", None)
        numbers = [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id]
        known = [number for number in numbers if isinstance(number, int) and 0 <= number < len(self.tokenizer)]
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(dict.fromkeys(known)))]

    def _not_loaded(self, part: str, error: Exception) -> UsageError:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return UsageError(f"verifier: the {part} of {self.name} cannot be loaded: {reason}")
