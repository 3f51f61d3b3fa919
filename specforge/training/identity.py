"""Identity of a checkpoint: the draft network, and the verifier that it is trained for.

Both are stored in every checkpoint and with the draft that a run writes. A run that would resume or start from another
draft is refused with the names of the differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from specforge.config import (
    CONFIG_NAME,
    NOT_COMPUTED,
    SpeculatorModelConfig,
    VerifierConfig,
    network_settings,
    verifier_difference,
)
from specforge.errors import UsageError
from specforge.models.scaled_linear import folded
from specforge.models.speculator import SpeculatorModel, network_of

_SHOWN = 8  # differences in a message


@dataclass(frozen=True)
class Identity:
    """A draft network and its verifier.

    Attributes:
        network: The configuration fields that determine what the network computes, and ``aux_layers``.
        trained: Names of the trainable parameters.
        verifier: Folder or hub id of the verifier; None if it is not known.
        fingerprint: Its fingerprint; None if it is not known.
    """

    network: dict[str, Any]
    trained: list[str]
    verifier: str | None
    fingerprint: str | None

    @classmethod
    def of(cls, draft: SpeculatorModel) -> Self:
        """Return the identity of a draft that is attached to its verifier's parts."""
        stored = draft.config.speculators_config
        verifier = stored.verifier if stored is not None else VerifierConfig()
        trained = [name for name, one in draft.named_parameters() if one.requires_grad]
        return cls(_network(draft), trained, verifier.name_or_path, verifier.fingerprint)

    def stored(self) -> dict[str, Any]:
        """Return it as plain values, as stored in a checkpoint."""
        return asdict(self)

    def is_of_another_verifier(self, other: Identity) -> bool:
        """Return whether two drafts are known to be for different verifiers."""
        return None not in (self.fingerprint, other.fingerprint) and self.fingerprint != other.fingerprint

    def differences(self, own: Identity) -> list[str]:
        """Describe each difference from another draft.

        Args:
            own: The draft of this run.
        """
        found = [
            f"{name} is {self.network[name]!r} there and {own.network[name]!r} here"
            for name in sorted(self.network.keys() & own.network.keys())
            if _differ(name, self.network[name], own.network[name])
        ]
        if self.is_of_another_verifier(own):
            found.append(
                f"verifier is {self.verifier} ({self.fingerprint}) there and {own.verifier} ({own.fingerprint}) here: "
                f"{verifier_difference(str(self.fingerprint), str(own.fingerprint))}"
            )
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        return [*found[:_SHOWN], *more]


def different_tensors(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Describe the first tensors whose shapes differ."""
    names = [name for name in own.keys() | stored.keys() if _shape(own, name) != _shape(stored, name)]
    return [f"{name} is {_shape(stored, name)} there and {_shape(own, name)} here" for name in sorted(names)[:3]]


def draft_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the draft in a training checkpoint, as they are exported.

    Args:
        checkpoint: Content of the file.
    """
    return folded(_draft_state(checkpoint))


def draft_in(checkpoint: Mapping[str, Any]) -> SpeculatorModel:
    """Build the draft of a training checkpoint, without a verifier.

    Args:
        checkpoint: Content of the file.

    Raises:
        UsageError: The checkpoint is of an earlier version, or damaged.
    """
    if "draft_config" not in checkpoint:
        raise UsageError(
            "the checkpoint is of an earlier version that did not store the draft's configuration. Resume its run "
            "with --ckpt_path, or use the draft/ that the run has written"
        )
    config = SpeculatorModelConfig.from_dict(checkpoint["draft_config"], where="the checkpoint's draft_config")
    return network_of(config).from_state(config, draft_weights(checkpoint), where="the checkpoint")


def refuse_another_draft(checkpoint: Mapping[str, Any], path: str, draft: SpeculatorModel, training: bool) -> None:
    """Refuse a training checkpoint of another draft.

    Args:
        checkpoint: Content of the file.
        path: The file, for messages.
        draft: The draft of this run.
        training: Whether the run resumes, so that the trained parameters must be the same, too.

    Raises:
        UsageError: Names the differences.
    """
    own, different = Identity.of(draft), list[str]()
    if "identity" in checkpoint:
        stored = Identity(**checkpoint["identity"])
        different = stored.differences(own)
        if training and stored.trained != own.trained:
            names = sorted({*stored.trained} ^ {*own.trained})
            different.append(f"trainable parameters differ: {', '.join(names[:3])}")
    else:
        rank_zero_warn(f"{path}, of an earlier version, does not name its draft and verifier")
    if different := different or different_tensors(_draft_state(checkpoint), draft.state_dict()):
        raise UsageError(
            f"{path} does not match this run: {'; '.join(different)}. Resume with the settings that it was trained "
            "with, or begin a new run without --ckpt_path"
        )


def start_from(draft: SpeculatorModel, given: SpeculatorModel | str) -> None:
    """Initialise a draft with the weights and the draft vocabulary of a stored one.

    Args:
        draft: The draft, attached to its verifier's parts.
        given: The stored draft, or its folder or hub id.

    Raises:
        UsageError: It does not exist, is another network, or is for another verifier; the differences are named.
    """
    if isinstance(given, str):
        stored, name = draft.read_start(given), f"model.init_from: {given}"
        config = f"{given}/{CONFIG_NAME}"
    else:
        stored, name, config = given, "the draft that was loaded", "its configuration"
    stored.attach_verifier(draft.verifier_parts)
    stored.borrow_embeddings()
    there, here = Identity.of(stored), Identity.of(draft)
    if different := there.differences(here) or different_tensors(stored.state_dict(), draft.state_dict()):
        what_to_do = "Use the model.draft settings of that draft"
        if here.is_of_another_verifier(there):
            what_to_do = (
                "Train it for the same verifier; to adapt it to this one, remove "
                f"speculators_config.verifier.fingerprint from {config}"
            )
        raise UsageError(f"{name} does not match this run: {'; '.join(different)}. {what_to_do}")
    draft.load_state_dict(stored.state_dict())


def _draft_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    prefix = "draft."
    saved: dict[str, Tensor] = checkpoint["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}


def _network(draft: SpeculatorModel) -> dict[str, Any]:
    layers = draft.aux_layers
    left_out = NOT_COMPUTED | draft.config.proposal_fields | {"max_position_embeddings"}  # engines set it themselves
    return {"aux_layers": layers} | {
        name: value
        for name, value in network_settings(draft.config).items()
        if name.rpartition(".")[2] not in left_out and not (layers and value == layers)
    }


def _differ(name: str, there: Any, here: Any) -> bool:
    # None in the draft's own configuration means a default, which shows in aux_layers and in the tensors.
    is_default = "." not in name and None in (there, here)
    return bool(there != here) and not is_default


def _shape(state: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None
