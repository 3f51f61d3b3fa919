"""A frozen verifier whose decoder layers are sharded over all processes, for verifiers that do not fit in one."""

from __future__ import annotations

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from specforge.private.torch import map_own
from specforge.verifier.features import decoder_layers
from specforge.verifier.loading import VerifierLoading, load_config, load_verifier, skeleton_of
from specforge.verifier.packed_attention import attend_by_documents
from specforge.verifier.parts import decoder


def load_sharded_verifier(name_or_path: str, loading: VerifierLoading, device: torch.device) -> PreTrainedModel:
    """Load a frozen verifier of whose decoder layers each process keeps a shard; all processes must call this.

    A layer is gathered while it runs, so all processes must run the verifier at the same time. Embeddings, final norm
    and head are replicated. While loading, the first process reads the files and holds all weights in host memory; a
    device never holds more than one whole layer.

    Args:
        name_or_path: Folder or hub id.
        loading: Type, revision and trust.
        device: This process's device.

    Raises:
        UsageError: There is no such verifier, or its weights cannot be read.
    """
    reads = torch.distributed.get_rank() == 0
    model = load_verifier(name_or_path, loading) if reads else _skeleton(name_or_path, loading)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = decoder_layers(model)
    inside = set(layers.modules())
    for layer in layers:
        for module in layer.modules():
            _receive(module, device)
        fully_shard(layer, mesh=mesh)
    for module in model.modules():
        if module not in inside:
            _receive(module, device)
    model.tie_weights()
    body = decoder(model)
    whole = {one for module in body.modules() if module not in inside for one in module.parameters(recurse=False)}
    # The layers share the streams of their root, so that one is gathered while the previous one runs.
    fully_shard(body, mesh=mesh, ignored_params=whole)
    return model.requires_grad_(False)


def _skeleton(name_or_path: str, loading: VerifierLoading) -> PreTrainedModel:
    model = skeleton_of(load_config(name_or_path, loading), name_or_path, loading)
    attend_by_documents(model)
    return model


def _receive(module: nn.Module, device: torch.device) -> None:
    """Copy a module's own tensors from the first process to all others."""
    map_own(module, lambda one: torch.empty_like(one, device=device) if one.is_meta else one.to(device))
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        torch.distributed.broadcast(tensor.data, src=0)
