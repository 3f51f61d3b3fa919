"""Finding and loading a verifier: its configuration, or all of it, frozen."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from specforge.config import CONFIG_NAME, find_file
from specforge.errors import UsageError
from specforge.verifier.packed_attention import attend_by_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


VerifierType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class VerifierLoading:
    """How to load a verifier.

    Attributes:
        dtype: Type of its weights; ``"auto"`` is the stored one, but float32 where there is no accelerator.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run model code that comes with the checkpoint.
    """

    dtype: VerifierType = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def torch_dtype(self, stored: torch.dtype | None) -> torch.dtype:
        """Return the type to load weights in, given the type that they are stored in."""
        if self.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self.dtype))
        if not torch.accelerator.is_available():
            return torch.float32
        return stored or torch.bfloat16


def load_config(name_or_path: str, loading: VerifierLoading | None = None) -> PreTrainedConfig:
    """Read a verifier's configuration; no weights are touched.

    Args:
        name_or_path: Folder or hub id.
        loading: Revision and trust; the defaults when None.

    Raises:
        UsageError: There is no such verifier, or it is not a causal language model of transformers.
    """
    loading = loading or VerifierLoading()
    try:
        find_file(name_or_path, CONFIG_NAME, revision=loading.revision)
    except UsageError as error:
        raise UsageError(f"verifier: {error}") from None
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=loading.revision, trust_remote_code=loading.trust_remote_code
        )
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"verifier {name_or_path}: {str(error).splitlines()[0]}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not loading.trust_remote_code:
        raise UsageError(
            f"verifier {name_or_path}: model type {config.model_type!r} is not a causal language model of transformers"
        )
    return config


def load_verifier(
    name_or_path: str, loading: VerifierLoading | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a whole verifier, frozen and in evaluation mode.

    Args:
        name_or_path: Folder or hub id.
        loading: Type, revision and trust; the defaults when None.
        device: Where each weight goes as it is read; torch's default device when None.

    Raises:
        UsageError: There is no such verifier, or its weights cannot be read.
    """
    loading = loading or VerifierLoading()
    config = load_config(name_or_path, loading)
    try:
        with device or nullcontext():
            model, report = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                config=config,
                dtype=loading.torch_dtype(config.get_text_config().dtype),
                revision=loading.revision,
                trust_remote_code=loading.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        raise UsageError(f"verifier {name_or_path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UsageError(f"verifier {name_or_path} lacks weights ({len(report['missing_keys'])}): {missing}")
    attend_by_documents(model)
    model.requires_grad_(False)
    return model.eval()


def running_verifier(name_or_path: str, loading: VerifierLoading | None = None) -> PreTrainedModel:
    """Load a whole verifier onto the accelerator, or where there is none onto the CPU; see ``load_verifier``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return load_verifier(name_or_path, loading, accelerator)
