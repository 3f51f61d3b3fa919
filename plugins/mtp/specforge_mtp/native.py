"""A head among its verifier's own tensors: names there and here, and reading.

Experts are one tensor for all of them here; in most files they are a tensor for each expert and projection.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.errors import UsageError
from specforge.models.storage import FLOATS
from specforge.verifier.loading import VerifierLoading
from specforge.verifier.parts import all_names, read_tensors
from specforge_mtp.config import MtpSpeculatorConfig
from specforge_mtp.families import FUSION
from specforge_mtp.model import MtpDraftModel

PROJECTION = "mtp_layers.0.input_proj.weight"
OWN = re.compile(r"mtp_layers\.(\d+)\.(([^.]+)\..+)")
EXPERTS = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")
# The projections of an expert that are one tensor here, in order.
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class NativeNames:
    """Names of a head's tensors in its verifier's files.

    Attributes:
        config: The head's configuration.
        stored: Names of all tensors in the verifier's files; empty if they are not known.
    """

    config: MtpSpeculatorConfig
    stored: Collection[str]

    @classmethod
    def of(cls, config: MtpSpeculatorConfig, verifier: str, loading: VerifierLoading) -> NativeNames:
        """Return the names in the files of a verifier, by folder or hub id."""
        return cls(config, frozenset(all_names(verifier, loading.revision)))

    def native(self, own: str) -> str:
        """Return the name in the verifier's files of a tensor of the network."""
        match = OWN.fullmatch(own)
        assert match is not None
        index, name, module = int(match[1]), match[2], match[3]
        family = self.config.family
        numbers = {"index": index, "layer": self.config.transformer_layer_config.num_hidden_layers + index}
        if module in FUSION:
            return family.fusion_prefix.format(**numbers) + name.replace(module, family.fusion[module], 1)
        return family.block_prefix.format(**numbers) + name

    def parts(self, own: str, shape: Sequence[int]) -> list[str]:
        """Return the names of the stored tensors that are one in the network: several if experts are stored singly.

        Args:
            own: Name of the tensor in the network.
            shape: Its shape, which begins with the number of experts.
        """
        whole = self.native(own)
        experts = EXPERTS.fullmatch(whole)
        if experts is None or whole in self.stored:
            return [whole]
        names = PROJECTIONS[experts[2]]
        return [f"{experts[1]}{number}.{name}.weight" for number in range(shape[0]) for name in names]

    def split(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's tensors as they are stored, by the names in the verifier's files."""
        found: dict[str, Tensor] = {}
        for own, tensor in state.items():
            names = self.parts(own, tensor.shape)
            pieces = [tensor] if len(names) == 1 else tensor.reshape(len(names), -1, tensor.shape[-1]).unbind(0)
            found |= zip(names, pieces, strict=True)
        return found

    def joined(
        self, shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], where: str
    ) -> dict[str, Tensor]:
        """Return stored tensors by the network's names.

        Args:
            shapes: Shapes of the network's tensors by name.
            tensors: The stored tensors.
            where: Name of the files in error messages.

        Raises:
            UsageError: A tensor is missing, of another shape, or quantised.
        """
        found = {}
        for own, shape in shapes.items():
            names = self.parts(own, shape)
            if missing := [name for name in names if name not in tensors]:
                raise UsageError(f"{where} has no tensor {missing[0]}, which is part of its prediction head")
            pieces = [tensors[name] for name in names]
            if wrong := [name for name, one in zip(names, pieces, strict=True) if one.dtype not in FLOATS]:
                raise UsageError(
                    f"{where}: {wrong[0]} is {tensors[wrong[0]].dtype}; quantised heads are not trained, only weights "
                    "in bfloat16, float16 or float32"
                )
            if sum(one.numel() for one in pieces) != torch.Size(shape).numel() or pieces[0].shape[-1] != shape[-1]:
                raise UsageError(
                    f"{where}: {names[0]} is {list(pieces[0].shape)}, and does not fit {own} of {list(shape)}, as "
                    "config.json has it"
                )
            found[own] = pieces[0] if len(pieces) == 1 else torch.stack(pieces).reshape(shape)
        return found


def shapes_of(config: MtpSpeculatorConfig) -> dict[str, torch.Size]:
    """Return the shapes of a head's tensors by name."""
    with torch.device("meta"):
        return {name: one.shape for name, one in MtpDraftModel(config).state_dict().items()}


def check_stored(config: MtpSpeculatorConfig, verifier: str, loading: VerifierLoading) -> None:
    """Refuse a verifier whose files hold no head, or only a part of it; no tensor is read.

    Args:
        config: The head's configuration.
        verifier: Folder or hub id of the verifier.
        loading: How to load it.

    Raises:
        UsageError: Names the first missing tensor.
    """
    names = NativeNames.of(config, verifier, loading)
    wanted = [name for own, shape in shapes_of(config).items() for name in names.parts(own, shape)]
    missing = [name for name in wanted if name not in names.stored]
    if len(missing) == len(wanted):
        raise UsageError(
            f"{verifier} holds no multi-token-prediction head: it has no tensor {names.native(PROJECTION)}. Some "
            "publishers leave it out, and tools that convert or quantise drop it; model.draft.fresh true trains a new "
            "one"
        )
    if missing:
        raise UsageError(f"{verifier} holds only a part of its prediction head: it has no tensor {missing[0]}")


def read_head(config: MtpSpeculatorConfig, verifier: str, loading: VerifierLoading) -> dict[str, Tensor]:
    """Read a head from its verifier's files; only those that hold some of it are opened.

    Args:
        config: The head's configuration.
        verifier: Folder or hub id of the verifier.
        loading: How to load it.

    Raises:
        UsageError: A tensor or a file is missing or damaged, or the tensors do not fit the configuration.
    """
    names, shapes = NativeNames.of(config, verifier, loading), shapes_of(config)
    wanted = [name for own, shape in shapes.items() for name in names.parts(own, shape)]
    return names.joined(shapes, read_tensors(verifier, wanted, loading.revision), verifier)
