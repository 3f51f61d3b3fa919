"""The base of every draft network: how it is stored, loaded, and attached to its verifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specforge.config import SpeculatorModelConfig, TokenProposalConfig
from specforge.documents import DocumentLayout
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge.models.generated import Generated
from specforge.models.scaled_linear import folded
from specforge.models.storage import FLOATS, read_all_weights, write_checkpoint
from specforge.registry import installed
from specforge.verifier.features import Features
from specforge.verifier.loading import load_verifier
from specforge.verifier.parts import VerifierParts

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

AttachmentMode = Literal["detached", "full", "train_only"]


def unchanged(logits: Tensor) -> Tensor:
    """Return logits unchanged."""
    return logits


class SpeculatorModel(nn.Module):
    """A draft network with its configuration.

    The verifier, or the parts of it that the draft borrows, is held outside the module tree: it is never trained,
    never moved or cast with the draft, and never saved.

    Args:
        config: The speculator's configuration.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = SpeculatorModelConfig

    def __init__(self, config: SpeculatorModelConfig) -> None:
        super().__init__()
        self.config = config
        self._attached: tuple[PreTrainedModel | None, VerifierParts] | None = None

    @property
    def verifier(self) -> PreTrainedModel | None:
        """The whole verifier; None if it is not attached in full."""
        return self._attached[0] if self._attached else None

    @property
    def verifier_parts(self) -> VerifierParts:
        """The attached verifier's embeddings, norm and head.

        Raises:
            ValueError: No verifier is attached.
        """
        if self._attached is None:
            raise ValueError("no verifier is attached; call attach_verifier() before using the draft")
        return self._attached[1]

    @property
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending; empty if only the last state is used."""
        return []

    @property
    def chosen_aux_layers(self) -> list[int] | None:
        """The layers of the configuration; None if they are derived from the verifier's number of layers."""
        return None

    @property
    def draft_ids(self) -> Tensor | None:
        """The verifier's id of each draft token, ascending, int64 [D]; None if the vocabularies are the same."""
        return None

    def borrow_embeddings(self) -> None:
        """Share the attached verifier's token embeddings if the draft's own are equal to them."""

    def drafter(self, batch_size: int) -> Drafter:
        """Create a drafter for a batch of sequences.

        Args:
            batch_size: Number of sequences.

        Raises:
            UsageError: The algorithm does not draft step by step.
        """
        raise UsageError(f"{type(self).__name__} cannot draft step by step; no proposal method can use it")

    def advance(self, *inputs: Any) -> Tensor:
        """Run the network once, for one step of a chain; training may recompute or compile this call.

        Args:
            *inputs: Inputs of this network.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define advance")

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the draft's steps at the rows that are needed, fed with the true tokens.

        Args:
            batch: ``input_ids``: the verifier's tokens x; ``position_ids``, which restart at 0 with each document;
                ``document_ids``: which document a token belongs to, -1 for padding; [B, T] each.
            features: The verifier's states over the batch.
            rows: The rows that each step runs.

        Returns:
            The states of these rows, concatenated step by step, [P, H] (see ``DraftRows.state_index``). Row t at step k
            predicts x_{t+2+k}, unless the algorithm's alignment differs.

        Raises:
            UsageError: The algorithm does not draft step by step.
        """
        raise UsageError(f"{type(self).__name__} cannot draft step by step; its acceptance length cannot be replayed")

    def unroll(
        self, input_ids: Tensor, features: Features, position_ids: Tensor, document_ids: Tensor, steps: int
    ) -> Tensor:
        """Run the draft's steps at every row, fed with the true tokens.

        Args:
            input_ids: As in ``states``.
            features: As in ``states``.
            position_ids: As in ``states``.
            document_ids: As in ``states``.
            steps: Number S of steps.

        Returns:
            The input of ``logits`` at each step, [S, B, T, H].

        Raises:
            UsageError: The algorithm does not draft step by step.
        """
        batch = {"input_ids": input_ids, "position_ids": position_ids, "document_ids": document_ids}
        rows = DraftRows.all(steps, input_ids.numel(), DocumentLayout.of(document_ids)).to(input_ids.device)
        return self.states(batch, features, rows).view(steps, *input_ids.shape, -1)

    @property
    def head_weights(self) -> Tensor | list[Tensor]:
        """The matrix that turns states into logits, [D, H]; or a list with one for each step."""
        raise NotImplementedError(f"{type(self).__name__} does not define head_weights")

    @property
    def further_head(self) -> Tensor | None:
        """A second matrix whose logits are added, [D, R]: it reads the last R columns of what the head reads."""
        return None

    def before_head(self, states: Tensor) -> Tensor:
        """Return the heads' input for states [..., H]; by default the states themselves."""
        return states

    @property
    def finish(self) -> Callable[[Tensor], Tensor]:
        """The function applied to logits after a head; by default the identity."""
        return unchanged

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Compute logits over the draft vocabulary from the result of ``unroll``, as training does.

        Training never calls this: it applies ``before_head``, ``head_weights``, ``further_head`` and ``finish`` to
        chunks of rows. A network that overrides it must return the same.

        Args:
            hidden: States of one step, [..., H].
            step: Index of the step, from 0; ignored by networks with a single head.

        Returns:
            Logits [..., D].
        """
        heads, read, further = self.head_weights, self.before_head(hidden), self.further_head
        head = heads if isinstance(heads, Tensor) else heads[step]
        logits = F.linear(read[..., : head.shape[1]], head)
        if further is not None:
            logits = logits + F.linear(read[..., head.shape[1] :], further)
        return self.finish(logits)

    def attach_verifier(
        self,
        verifier: str | os.PathLike[str] | PreTrainedModel | VerifierParts,
        mode: Literal["full", "train_only"] | None = None,
    ) -> PreTrainedModel | VerifierParts:
        """Attach the verifier whose embeddings, norm and head the draft uses.

        Args:
            verifier: A folder, a hub id, a loaded model, or its parts.
            mode: ``"full"`` (the default) keeps the whole model; ``"train_only"`` only the parts that a forward pass
                of the draft needs, read from its files without building the model.

        Returns:
            The attached verifier: the whole model, or its parts.
        """
        if isinstance(verifier, str | os.PathLike):
            name = str(verifier)
            verifier = VerifierParts.from_pretrained(name) if mode == "train_only" else load_verifier(name)
        if isinstance(verifier, VerifierParts):
            self._attached = (None, verifier)
            return verifier
        self._attached = (verifier if mode != "train_only" else None, VerifierParts.of(verifier))
        return verifier

    def detach_verifier(self) -> None:
        """Detach the verifier; the draft cannot run until another is attached."""
        self._attached = None

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        proposal: str | TokenProposalConfig | None = None,
        verification: Literal["token", "block", "typical"] = "token",
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        return_dict_in_generate: bool = False,
        **others: Any,
    ) -> Tensor | Generated:
        """Generate the attached verifier's own text: token for token at temperature 0, in distribution above 0.

        Arguments that transformers' ``generate`` also has have the same meaning.

        Args:
            input_ids: Prompts, int64 [B, T]; shorter ones are padded on either side.
            attention_mask: 1 on the prompts' tokens, 0 on padding, [B, T]; all ones if None.
            max_new_tokens: Maximum number of tokens to generate; 256 if None.
            do_sample: Whether to sample; if None, sample if the temperature is above 0.
            temperature: 0 takes the most probable token; if None, 1 with ``do_sample=True`` and 0 otherwise.
            top_k: Sample only from the k most probable tokens; None or 0 for all.
            top_p: Sample from the smallest set of tokens with this total probability; None for all.
            proposal: Settings of the proposal method, its name, or ``"NAME:KEY=VALUE,..."``; the draft's default if
                None.
            verification: ``"token"`` and ``"block"`` are lossless; ``"typical"`` is LOSSY.
            eos_token_id: Ids that end a sequence; by default from the verifier's ``generation_config``.
            pad_token_id: Padding of shorter sequences; by default from the verifier's ``generation_config``.
            seed: Random seed; None uses the device's current random state.
            streamer: A streamer of transformers, for one sequence.
            return_dict_in_generate: Whether to return rounds, acceptance and time, too.
            **others: Other arguments of transformers' ``generate``, refused unless they have no effect.

        Returns:
            Prompts and generated tokens, int64 [B, T + new]; or ``Generated``, which holds them as ``sequences``.

        Raises:
            ValueError: No whole verifier is attached, a value is out of bounds, or an argument is not supported.
            TypeError: Prompts are not token ids, or there is no such argument.
            UsageError: Draft, proposal method, verifier and prompts do not match.
        """
        # Decoding imports the drafts that it runs; this is the only import in the other direction.
        from specforge.decoding.generation import generate

        generated = generate(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            proposal=proposal,
            verification=verification,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            seed=seed,
            streamer=streamer,
            others=others,
        )
        return generated if return_dict_in_generate else generated.sequences

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        verifier: str | os.PathLike[str] | PreTrainedModel | VerifierParts | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a draft in the ``speculators`` layout from a folder or the hub; ``specforge convert`` reads others.

        Called on ``SpeculatorModel``, it finds the network's class by the checkpoint's ``speculators_model_type``.

        Args:
            name_or_path: Folder or hub id.
            verifier: The verifier to attach; by default the draft is loaded detached.
            verifier_attachment_mode: How to attach it; ``"full"`` by default.
            dtype: Dtype to cast the weights to; as stored if None.
            **options: Passed to ``huggingface_hub.hf_hub_download``.

        Raises:
            UsageError: The checkpoint is missing or damaged, or its tensors do not match the network.
        """
        config = cls.config_class.from_pretrained(name_or_path, **options)
        state = read_all_weights(name_or_path, **options)
        model_class: Any = cls if cls is not SpeculatorModel else network_of(config)
        model: Self = model_class.from_state(config, state, where=str(name_or_path))
        if dtype is not None:
            model.cast(dtype)
        if verifier is not None and verifier_attachment_mode != "detached":
            model.attach_verifier(verifier, verifier_attachment_mode)
        return model

    def read_start(self, name_or_path: str) -> Self:
        """Read the draft whose weights training starts from; overridden if it may be of another algorithm.

        Args:
            name_or_path: Folder or hub id.
        """
        return type(self).from_pretrained(name_or_path)

    @classmethod
    def from_state(cls, config: SpeculatorModelConfig, state: Mapping[str, Tensor], where: str = "weights") -> Self:
        """Build the network and fill it with tensors under its own names; no weight stays random.

        Weights of several dtypes are cast to the narrowest that holds all of them without loss.

        Args:
            config: The speculator's configuration.
            state: Tensors by name.
            where: Name of the source in error messages.

        Raises:
            UsageError: The network cannot be built from the configuration, or tensors are missing, unknown, of the
                wrong shape or dtype, or contradictory; they are named.
        """
        try:
            with torch.device("meta"):
                model = cls.for_state(config, state)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        except Exception as error:  # transformers and torch raise many types for inconsistent sizes
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{where}: cannot build {cls.__name__} from its configuration: {type(error).__name__}: {reason}"
            ) from None
        own = model.state_dict()
        faults = [f"missing: {name}" for name in sorted(own.keys() - state.keys())]
        faults += [f"unknown: {name}" for name in sorted(state.keys() - own.keys())]
        faults += [
            f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if own[name].shape != state[name].shape
        ]
        faults = faults or [fault for name in own for fault in _type_faults(name, state[name], own[name])]
        if not faults:
            # Integers are stored in dtypes of any width, and weights in several; the network computes in one.
            kinds = {one.dtype for one in state.values() if one.is_floating_point()}
            widest = reduce(torch.promote_types, kinds) if kinds else torch.float32
            state = {n: one.to(widest if own[n].is_floating_point() else own[n].dtype) for n, one in state.items()}
            faults = list(model.stored_faults(state))
        if faults:
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise UsageError(f"{where} does not match {cls.__name__}: {'; '.join(faults[:8])}{more}")
        model.load_state_dict(state, assign=True)
        model.reset_constants()
        return model

    @classmethod
    def for_state(cls, config: SpeculatorModelConfig, state: Mapping[str, Tensor]) -> Self:
        """Build the network of stored tensors; override this if they determine its structure."""
        return cls(config)

    def stored_faults(self, state: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield faults in the values of stored tensors; override this if they may be contradictory.

        Args:
            state: Tensors by name, with the network's own shapes and dtypes.
        """
        yield from ()

    def reset_constants(self) -> None:
        """Compute buffers that are not stored in checkpoints, such as rotary frequencies; override if there are any."""

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the weights in place; rotary frequencies, which need their precision, are not cast."""
        self.to(dtype)
        self.reset_constants()
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(one.dtype for one in self.state_dict().values() if one.is_floating_point())

    def stored_config(self) -> dict[str, Any]:
        """Return the content of ``config.json`` in the ``speculators`` layout, including the weights' dtype."""
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        return self.config.to_dict()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``; other files in the folder are not touched.

        Raises:
            SpecforgeError: They cannot be written; an earlier checkpoint in the folder is unchanged.
        """
        write_checkpoint(Path(folder), self.stored_config(), folded(self.state_dict()))


def network_of(config: SpeculatorModelConfig) -> type[SpeculatorModel]:
    """Return the network class of a configuration.

    Raises:
        UsageError: No installed plugin provides it.
    """
    network: type[SpeculatorModel] = installed().load(
        installed().find(Algorithm, config.speculators_model_type), "model"
    )
    return network


def _type_faults(name: str, stored: Tensor, own: Tensor) -> Iterator[str]:
    """Yield why a stored tensor cannot be the network's own one of the same shape."""
    kind = str(stored.dtype).removeprefix("torch.")
    if own.is_floating_point():
        if stored.dtype not in FLOATS:
            yield f"{name} is {kind}; quantised weights are not read, only float32, bfloat16, float16 and float64"
    elif stored.is_floating_point() or stored.is_complex() or (stored.dtype == torch.bool) > (own.dtype == torch.bool):
        yield f"{name} is {kind}, but must hold integers"
    elif own.dtype == torch.bool and bool(((stored != 0) & (stored != 1)).any()):
        yield f"{name} must hold 0 and 1, but holds {int(stored.max())}"
