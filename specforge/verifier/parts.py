"""The parts of a verifier that a draft needs in addition to its features: token embeddings, final norm and head.

They are shared with a loaded verifier, or read tensor by tensor from its files without loading the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specforge.config import find_file, read_json
from specforge.errors import UsageError
from specforge.verifier.files import WEIGHTS, WEIGHTS_INDEX
from specforge.verifier.loading import VerifierLoading, load_config, skeleton_of
from specforge.verifier.names import stored_names

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f", "embedding_norm")


@dataclass(frozen=True)
class VerifierParts:
    """A verifier's embeddings, final norm and head, frozen.

    Attributes:
        config: The verifier's text configuration.
        embed_tokens: Token embeddings [V, H].
        norm: The norm between the last decoder layer and the head.
        lm_head: The head, H -> V.
    """

    config: PreTrainedConfig
    embed_tokens: nn.Embedding
    norm: nn.Module
    lm_head: nn.Linear

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Share the parts of a loaded verifier.

        Raises:
            UsageError: The model has no final norm under a known name.
        """
        return cls(
            config=model.config.get_text_config(),
            embed_tokens=model.get_input_embeddings(),
            norm=getattr(decoder(model), _final_norm_name(model)),
            lm_head=model.get_output_embeddings(),
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str, loading: VerifierLoading | None = None) -> Self:
        """Read only the parts from a verifier's files; only the shards that hold them are opened.

        Args:
            name_or_path: Folder or hub id.
            loading: Type, revision and trust. Default: ``VerifierLoading()``.

        Raises:
            UsageError: There is no such verifier, or a tensor is missing or cannot be read.
        """
        loading = loading or VerifierLoading()
        config = load_config(name_or_path, loading)
        skeleton = skeleton_of(config, name_or_path, loading)
        parts = cls.of(skeleton.requires_grad_(False))
        names = {module: name for name, module in skeleton.named_modules()}
        tied = parts.lm_head.weight is parts.embed_tokens.weight or getattr(parts.config, "tie_word_embeddings", False)
        dtype = loading.torch_dtype(parts.config.dtype)
        stored = stored_names(skeleton, all_names(name_or_path, loading.revision))
        for module in (parts.embed_tokens, parts.norm) if tied else (parts.embed_tokens, parts.norm, parts.lm_head):
            own = [f"{names[module]}.{key}" for key in module.state_dict()]
            in_files = [stored.get(name, name) for name in own]
            tensors = read_tensors(name_or_path, in_files, revision=loading.revision)
            state = {name.rpartition(".")[2]: tensor.to(dtype) for name, tensor in tensors.items()}
            _assign(module, names[module], state, name_or_path)
            _restore_constants(module)
        if tied:
            parts.lm_head.weight = parts.embed_tokens.weight
        for module in (parts.embed_tokens, parts.norm, parts.lm_head):
            module.requires_grad_(False)
        return parts

    def logits(self, last: Tensor) -> Tensor:
        """Convert states before the final norm to the verifier's logits.

        Args:
            last: Output of the last decoder layer, [..., H].

        Returns:
            Logits [..., V] in the head's dtype, with the scaling and soft cap of the model family.
        """
        return self.head(self.norm(last))

    def head(self, states: Tensor) -> Tensor:
        """Convert states after the final norm [..., H] to the verifier's logits [..., V]."""
        return self._scaled(self.lm_head(states))

    def finish(self, logits: Tensor) -> Tensor:
        """Convert products with the head's matrix [..., V] to logits: add bias, scaling and soft cap of the family."""
        bias = self.lm_head.bias
        return self._scaled(logits if bias is None else logits + bias)

    def _scaled(self, logits: Tensor) -> Tensor:
        if scale := getattr(self.config, "logits_scaling", None):
            logits = logits / scale
        for name in ("logit_scale", "lm_head_multiplier"):
            if scale := getattr(self.config, name, None):
                logits = logits * scale
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module with a model's decoder layers and final norm; for multimodal models, the text decoder."""
    get_decoder = getattr(model, "get_decoder", None)
    found = get_decoder() if get_decoder is not None else None
    named = found if isinstance(found, nn.Module) else model.base_model
    if layers_of(named, model.config) is not None:
        return named
    # Some models name another module, or themselves; the layers are next to the embeddings.
    embeddings = model.get_input_embeddings()
    for module in model.modules():
        if layers_of(module, model.config) is not None and any(child is embeddings for child in module.children()):
            return module
    return named


def layers_of(body: nn.Module, config: PreTrainedConfig) -> nn.ModuleList | None:
    """Return the child list with ``num_hidden_layers`` modules: the decoder layers; None if there is none."""
    number = config.get_text_config().num_hidden_layers
    lists = (child for child in body.children() if isinstance(child, nn.ModuleList))
    return next((one for one in lists if len(one) == number), None)


def read_tensors(name_or_path: str, names: Iterable[str], revision: str | None = None) -> dict[str, Tensor]:
    """Read some tensors of a checkpoint by name, from one safetensors file or from shards with an index.

    Raises:
        UsageError: The checkpoint has no safetensors, lacks one of the tensors, or a file is damaged.
    """
    names = list(names)
    files = files_of(name_or_path, revision)
    unlisted = [name for name in names if files and name not in files]
    if unlisted:
        raise UsageError(f"{name_or_path}: its {WEIGHTS_INDEX} has no tensor {', '.join(unlisted)}")
    tensors: dict[str, Tensor] = {}
    for file_name in sorted({files.get(name, WEIGHTS) for name in names}):
        path = find_file(name_or_path, file_name, revision=revision)
        try:
            with safe_open(path, framework="pt") as file:
                available = set(file.keys())
                for name in names:
                    if name in available:
                        tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged or not a safetensors file: {error}") from None
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UsageError(f"{name_or_path} has no tensor {', '.join(missing)}")
    return tensors


def stored_shapes(name_or_path: str, revision: str | None = None) -> dict[str, list[int]]:
    """Return the shapes of all tensors of a checkpoint by name; this opens all its files.

    Raises:
        UsageError: The checkpoint has no safetensors, or a file is damaged.
    """
    shapes: dict[str, list[int]] = {}
    for file_name in sorted(set(files_of(name_or_path, revision).values())) or [WEIGHTS]:
        path = find_file(name_or_path, file_name, revision=revision)
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged or not a safetensors file: {error}") from None
    return shapes


def all_names(name_or_path: str, revision: str | None = None) -> list[str]:
    """Return the names of all tensors of a checkpoint.

    Raises:
        UsageError: The checkpoint has no safetensors, or its only file is damaged.
    """
    if files := files_of(name_or_path, revision):
        return list(files)
    return list(stored_shapes(name_or_path, revision))


def files_of(name_or_path: str, revision: str | None) -> dict[str, str]:
    """Map a checkpoint's tensor names to its shard files; empty if it is a single file.

    Raises:
        UsageError: The index has no ``weight_map``.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and (folder / WEIGHTS).is_file():
        return {}
    try:
        index = find_file(name_or_path, WEIGHTS_INDEX, revision=revision)
    except UsageError:
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UsageError(f"{index} has no weight_map, which maps each tensor to its file")
    return weight_map


def _assign(module: nn.Module, name: str, state: dict[str, Tensor], where: str) -> None:
    for key, own in module.state_dict().items():
        if state[key].shape != own.shape:
            raise UsageError(
                f"{where}: {name}.{key} is {list(state[key].shape)}, but {list(own.shape)} according to config.json"
            )
    module.load_state_dict(state, assign=True)


def _final_norm_name(model: PreTrainedModel) -> str:
    for name in FINAL_NORM_NAMES:
        if isinstance(getattr(decoder(model), name, None), nn.Module):
            return name
    raise UsageError(
        f"{type(model).__name__} has no final norm under a known name ({', '.join(FINAL_NORM_NAMES)}); "
        "it cannot be used as a verifier"
    )


def _restore_constants(module: nn.Module) -> None:
    """Set constants that no checkpoint stores and that have no value on the meta device."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            scale = getattr(module, "scalar_embed_scale", None)
            if scale is None:
                raise UsageError(f"{type(module).__name__} has a buffer {name!r} that no checkpoint holds")
            module.register_buffer(name, torch.tensor(scale), persistent=False)
