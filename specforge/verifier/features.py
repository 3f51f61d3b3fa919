"""Capturing a verifier's features: the residual stream at chosen layers.

Layer id k is the residual stream *before* decoder layer k: 0 is the embedding output, k the output of layer k - 1, and
N, the number of layers, the output of the last layer. Hooks take it before the final norm; transformers'
``hidden_states[-1]`` is after the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from specforge.documents import EACH_ROW_ONE_DOCUMENT, DocumentLayout, Groups
from specforge.errors import UsageError
from specforge.moving import moved
from specforge.verifier.diagnosis import reason_of
from specforge.verifier.finite import check_finite
from specforge.verifier.packed_attention import attending_to, document_numbers
from specforge.verifier.parts import VerifierParts, decoder, layers_of


@dataclass(frozen=True)
class Features:
    """States of a verifier over a batch.

    Attributes:
        aux: Residual stream at the aux layers in ascending order, [B, T, n, H].
        last: Output of the last decoder layer, before the final norm, [B, T, H].
    """

    aux: Tensor
    last: Tensor


def check_aux_layers(layer_ids: Sequence[int], num_layers: int) -> None:
    """Refuse layer ids that are not ascending or out of bounds.

    Raises:
        UsageError: Names the ids, the verifier's number of layers and the allowed ids.
    """
    in_bounds = all(0 <= layer <= num_layers for layer in layer_ids)
    ascending = all(low < high for low, high in pairwise(layer_ids))
    if not layer_ids or not in_bounds or not ascending:
        raise UsageError(
            f"aux layers {list(layer_ids)} must be ascending ids in 0..{num_layers}: id k is the state before decoder "
            f"layer k, and {num_layers} is the output of the last layer"
        )


@torch.no_grad()
def capture(
    verifier: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    aux_layers: Sequence[int],
    documents: DocumentLayout | None = None,
    **options: Any,
) -> Features:
    """Run a verifier's decoder and return the requested states; no logits are computed.

    Several threads may use one verifier at the same time.

    Args:
        verifier: Any transformers causal language model.
        input_ids: Tokens [B, T].
        position_ids: Positions [B, T]. If they restart at 0 with each document, no document attends to another;
            families that cannot separate documents within a row run one document per row.
        aux_layers: Ascending layer ids.
        documents: Where the documents are, padding left out. By default they begin where positions do not increase by
            1, and a device waits until that is found.
        **options: Passed to the decoder: a cache, an attention mask. Rows then see what these say.

    Returns:
        The states, in the verifier's type; of padding, any.
    """
    if options:
        return _captured(verifier, input_ids, position_ids, aux_layers, None, **options)
    if documents is None:
        documents = DocumentLayout.of(document_numbers(position_ids))
    if not documents.whole_rows and not packs(verifier):
        return _captured_apart(verifier, input_ids, position_ids, aux_layers, documents)
    return _captured(verifier, input_ids, position_ids, aux_layers, documents)


def _captured(
    verifier: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    aux_layers: Sequence[int],
    documents: DocumentLayout | None,
    **options: Any,
) -> Features:
    """Run rows unchanged."""
    body = decoder(verifier)
    layers = decoder_layers(verifier)
    states: dict[int, Tensor] = {}
    wanted = {*aux_layers, len(layers)}
    attention = nullcontext() if documents is None else attending_to(documents, input_ids.device)
    with attention, _recording(layers, wanted, states):
        body(input_ids=input_ids, position_ids=position_ids, **{"use_cache": False, **options})
    last = states[len(layers)]
    if not aux_layers:
        return Features(last.new_empty(*last.shape[:2], 0, last.shape[2]), last)
    return Features(torch.stack([states[layer] for layer in aux_layers], dim=2), last)


def _captured_apart(
    verifier: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    aux_layers: Sequence[int],
    documents: DocumentLayout,
) -> Features:
    """Run each document as a row of its own, together with others of similar length, and join the states again."""
    groups = moved(Groups.of(documents.groups), input_ids.device)
    found = []
    for tokens, positions in zip(*(groups.gather(one.flatten()) for one in (input_ids, position_ids)), strict=True):
        # Padding follows a document, which does not see it.
        going_on = positions[:, :1] + torch.arange(positions.shape[1], device=positions.device)
        found.append(_captured(verifier, tokens, going_on, aux_layers, EACH_ROW_ONE_DOCUMENT))
    number = input_ids.numel()
    aux, last = (groups.scatter(one, number) for one in ([own.aux for own in found], [own.last for own in found]))
    return Features(aux.unflatten(0, input_ids.shape), last.unflatten(0, input_ids.shape))


@torch.no_grad()
def check_logits(verifier: PreTrainedModel) -> None:
    """Check that the final norm and head, applied to the captured last state, give the verifier's own logits.

    A family that computes anything else between its last layer and its logits would silently train and measure every
    draft wrongly.

    Raises:
        UsageError: The logits differ or are not finite.
    """
    vocabulary = verifier.config.get_text_config().vocab_size
    tokens = torch.arange(1, 9).remainder(vocabulary)[None].to(verifier.device)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    parts = VerifierParts.of(verifier)
    try:
        last = capture(verifier, tokens, positions, [0]).last
        check_finite(last, verifier, name_of(verifier))
        rebuilt, own = parts.logits(last), verifier(tokens, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{type(verifier).__name__}: its forward pass fails, so {verifier.config.name_or_path}/config.json is "
            f"inconsistent: {reason_of(error)}"
        ) from error
    check_finite(own, verifier, name_of(verifier))
    if not torch.allclose(rebuilt.float(), own.float(), atol=1e-2, rtol=1e-2):
        raise UsageError(
            f"{type(verifier).__name__}: its final norm and head do not give its own logits from the last layer's "
            "output, so drafts cannot be trained or run for this model family"
        )


def check_documents(verifier: PreTrainedModel) -> None:
    """Check that a document of a packed row does not read the one before it, for a sharded verifier.

    In families with a recurrent state or their own attention it does. ``capture`` normally runs their documents one
    per row, but then processes that share a verifier would run different numbers of forward passes.

    Raises:
        UsageError: A document reads the one before it.
    """
    if not _separates_documents(verifier):
        raise UsageError(
            f"verifier_sharding: {type(verifier).__name__} reads across the documents of a packed row, and a verifier "
            "that is sharded over processes cannot run them one by one; train with data.packing: false, without "
            "verifier_sharding, or on states stored by specforge prepare features"
        )


_packs: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def packs(verifier: PreTrainedModel) -> bool:
    """Return whether packed rows run unchanged; otherwise each document becomes a row. Tested once per verifier.

    Always True for a sharded verifier, see ``check_documents``.
    """
    if isinstance(decoder_layers(verifier)[0], FSDPModule):
        return True
    if verifier not in _packs:
        _packs[verifier] = _separates_documents(verifier)
    return _packs[verifier]


def assume_packs(verifier: PreTrainedModel) -> None:
    """Assume that packed rows run unchanged, for states without values, which cannot be tested."""
    _packs[verifier] = True


@torch.no_grad()
def _separates_documents(verifier: PreTrainedModel) -> bool:
    """Return whether a document of a packed row is independent of the one before it."""
    # Attention chunks are counted from the start of the row.
    if "chunked_attention" in (getattr(verifier.config.get_text_config(), "layer_types", None) or []):
        return False
    vocabulary = verifier.config.get_text_config().vocab_size
    tokens = torch.arange(1, 9).remainder(vocabulary)[None].to(verifier.device)
    others = torch.cat([tokens[:, :4].flip(1), tokens[:, 4:]], dim=1)
    positions = torch.arange(4, device=tokens.device).repeat(2)[None]
    documents = DocumentLayout.of(document_numbers(positions))
    after, after_others = (_captured(verifier, one, positions, [0], documents).last[:, 4:] for one in (tokens, others))
    check_finite(after, verifier, name_of(verifier))
    return torch.allclose(after, after_others, atol=1e-2 * float(after.abs().max()), rtol=0)


def name_of(verifier: PreTrainedModel) -> str:
    """Return the folder or hub id of a verifier, or its class if it was created in memory."""
    return verifier.config.name_or_path or type(verifier).__name__


def decoder_layers(verifier: PreTrainedModel) -> nn.ModuleList:
    """Return the list of a verifier's decoder layers.

    Raises:
        UsageError: The model has no such list, so its features cannot be captured.
    """
    layers = layers_of(decoder(verifier), verifier.config)
    if layers is None:
        number = verifier.config.get_text_config().num_hidden_layers
        raise UsageError(
            f"{type(verifier).__name__} has no list of its {number} decoder layers; it cannot be a verifier"
        )
    return layers


@contextmanager
def _recording(layers: nn.ModuleList, wanted: set[int], states: dict[int, Tensor]) -> Iterator[None]:
    # Hooks belong to the module, so they also see forward passes of other threads.
    own = get_ident()

    def before(layer_id: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if get_ident() == own:
                states[layer_id] = arguments[0] if arguments else keywords["hidden_states"]

        return hook

    def after_last(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if get_ident() == own:
            states[len(layers)] = output if isinstance(output, Tensor) else output[0]

    handles = [
        layers[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer in wanted
        if layer < len(layers)
    ]
    handles.append(layers[-1].register_forward_hook(after_last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
