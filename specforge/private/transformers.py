"""Private names of transformers."""

from __future__ import annotations

from typing import Any

from jinja2 import Template
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.chat_template_utils import _compile_jinja_template


def attention_of(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention implementation of a configuration; None if it is not set yet."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Set the attention implementation of single layers; whole models have a public method for it."""
    config._attn_implementation = name


def is_recurrent(verifier: PreTrainedModel) -> bool:
    """Return whether a model has a recurrent state, from which tokens cannot be removed."""
    return bool(getattr(verifier, "_is_stateful", False))


def builds(auto_class: Any, config: PreTrainedConfig) -> bool:
    """Return whether an Auto class has a model class for a configuration."""
    return type(config) in auto_class._model_mapping


def compiled_template(source: str) -> Template:
    """Return the compiled chat template that ``render_jinja_template`` uses for a source."""
    template: Template = _compile_jinja_template(source)
    return template
