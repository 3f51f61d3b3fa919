"""Loading a verifier's configuration, or the whole frozen model."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from specforge.bounds import VerifierType
from specforge.config import CONFIG_NAME, find_file, read_json
from specforge.errors import UsageError
from specforge.private.transformers import builds
from specforge.verifier.diagnosis import (
    field_faults,
    reason_of,
    size_faults,
    why_not_built,
    why_not_fitting,
    why_not_read,
)
from specforge.verifier.packed_attention import attend_by_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class VerifierLoading:
    """How to load a verifier.

    Attributes:
        dtype: Type of its weights; ``"auto"`` is the stored type on an accelerator, or bfloat16 on a processor that
            multiplies matrices of it, and float32 otherwise.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run model code shipped with the checkpoint.
    """

    dtype: VerifierType = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def torch_dtype(self, stored: torch.dtype | None) -> torch.dtype:
        """Return the type for loading weights, given their stored type."""
        if self.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self.dtype))
        return stored or torch.bfloat16 if torch.accelerator.is_available() else processor_dtype(stored)


def processor_dtype(stored: torch.dtype | None) -> torch.dtype:
    """Return the faster type for a verifier on this processor, given the stored type.

    Without instructions for products of bfloat16 matrices, Intel's AMX, these are many times slower than in float32.
    """
    multiplies = torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if multiplies and stored == torch.bfloat16 else torch.float32


def load_config(name_or_path: str, loading: VerifierLoading | None = None) -> PreTrainedConfig:
    """Read a verifier's configuration without touching its weights.

    Args:
        name_or_path: Folder or hub id.
        loading: Revision and trust. Default: ``VerifierLoading()``.

    Raises:
        UsageError: There is no such verifier, a field has a wrong type or value, or it is not a language model.
    """
    loading = loading or VerifierLoading()
    try:
        path = find_file(name_or_path, CONFIG_NAME, revision=loading.revision)
        values = read_json(path)
    except UsageError as error:
        raise UsageError(f"verifier: {error}") from None
    if faults := list(field_faults(values)):
        raise UsageError(f"verifier {path}: {'; '.join(faults)}")
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=loading.revision, trust_remote_code=loading.trust_remote_code
        )
    except Exception as error:  # each family checks its fields in its own way
        why = reason_of(error) if "auto_map" in values else why_not_read(values, error)
        raise UsageError(f"verifier {path}: {why}") from error
    if auto_class(config) is None and not loading.trust_remote_code:
        raise UsageError(
            f"verifier {path}: model type {config.model_type!r} is not a causal language model of transformers"
        )
    if faults := list(size_faults(config)):
        raise UsageError(f"verifier {path}: {'; '.join(faults)}")
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the transformers auto class of a verifier: for language models or, failing that, multimodal ones.

    None if the configuration is not of a language model.
    """
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((one for one in classes if builds(one, config)), None)


def skeleton_of(config: PreTrainedConfig, name_or_path: str, loading: VerifierLoading) -> PreTrainedModel:
    """Build a verifier on the meta device, in evaluation mode and in the type of its loaded weights.

    Raises:
        UsageError: No model can be built from the configuration.
    """
    try:
        return _built(config, loading).eval()
    except Exception as error:
        why = why_not_built(config, partial(_built, loading=loading), error)
        raise UsageError(f"verifier {name_or_path}/{CONFIG_NAME}: {why}") from error


def load_verifier(
    name_or_path: str, loading: VerifierLoading | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a whole verifier, frozen and in evaluation mode.

    Args:
        name_or_path: Folder or hub id.
        loading: Type, revision and trust. Default: ``VerifierLoading()``.
        device: Device onto which each weight is read. Default: torch's default device.

    Raises:
        UsageError: There is no such verifier, or its weights cannot be read or do not fit its configuration.
    """
    loading = loading or VerifierLoading()
    config = load_config(name_or_path, loading)
    try:
        with device or nullcontext():
            model, report = (auto_class(config) or AutoModelForCausalLM).from_pretrained(
                name_or_path,
                config=config,
                dtype=loading.torch_dtype(config.get_text_config().dtype),
                revision=loading.revision,
                trust_remote_code=loading.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        skeleton_of(config, name_or_path, loading)
        if why := _mismatch(config, name_or_path, loading):
            raise UsageError(f"verifier {name_or_path}/{CONFIG_NAME}: {why}") from error
        raise UsageError(f"verifier {name_or_path} cannot be loaded: {reason_of(error)}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        why = _mismatch(config, name_or_path, loading, report["missing_keys"])
        because = f"; {CONFIG_NAME}: {why}" if why else ""
        raise UsageError(f"verifier {name_or_path} lacks weights ({len(report['missing_keys'])}): {missing}{because}")
    attend_by_documents(model)
    model.requires_grad_(False)
    return cast("PreTrainedModel", model.eval())


def _built(config: PreTrainedConfig, loading: VerifierLoading) -> PreTrainedModel:
    dtype = loading.torch_dtype(config.get_text_config().dtype)
    with torch.device("meta"):
        model: PreTrainedModel = (auto_class(config) or AutoModelForCausalLM).from_config(
            config, dtype=dtype, trust_remote_code=loading.trust_remote_code
        )
    return model


def _mismatch(
    config: PreTrainedConfig, name_or_path: str, loading: VerifierLoading, missing: Collection[str] = ()
) -> str | None:
    """Explain why weights do not fit a configuration; None if they fit or it cannot be determined."""
    from specforge.verifier.parts import stored_shapes  # imports this module

    try:
        shapes = stored_shapes(name_or_path, loading.revision)
        return why_not_fitting(config, partial(_built, loading=loading), shapes, missing)
    except Exception:  # damaged files or another format, which loading reports
        return None


def running_verifier(name_or_path: str, loading: VerifierLoading | None = None) -> PreTrainedModel:
    """Load a whole verifier onto the accelerator if there is one, otherwise the CPU; see ``load_verifier``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return load_verifier(name_or_path, loading, accelerator)
