"""States as serving engines write them: vLLM's files, the layers in them, and their check against a row.

``<request>.safetensors`` holds ``token_ids`` int64 [T] and ``hidden_states`` [T, L, H], layers in the order of the
server's ids. One-byte values come with ``hidden_states_scales``. ``<request>.safetensors.lock`` exists before the
response is sent, and is locked until the file is written. The files do not name their verifier.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class WrongStates(Exception):
    """States that an engine has written are missing, damaged, or not those of the row."""


@dataclass(frozen=True)
class ServedStates:
    """States of one request.

    Attributes:
        token_ids: The tokens of the request, int64 [T].
        states: Their states [T, L, H].
    """

    token_ids: Tensor
    states: Tensor


def engine_layer_ids(layers: Sequence[int]) -> list[int]:
    """Return vLLM's ids of some layers, for ``eagle_aux_hidden_state_layer_ids``.

    With h_0 the embedding output and h_k = layer_{k-1}(h_{k-1}) for k = 1 .. N, our id k is the state before decoder
    layer k, which is h_k; vLLM's id k is the state after k layers, which is h_k as well, and its id N is the output of
    the last layer before the final norm. So id_vllm(k) = k for 0 <= k <= N.
    """
    return list(layers)


def read_states(path: Path) -> ServedStates:
    """Read a file of states.

    Raises:
        WrongStates: It is missing, damaged or holds something else.
    """
    try:
        return as_states(load_file(path), str(path))
    except FileNotFoundError:
        raise WrongStates(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise WrongStates(f"{path} is damaged: {error}") from None


def as_states(tensors: Mapping[str, Tensor], where: str) -> ServedStates:
    """Return the states of a request from its tensors.

    Args:
        tensors: The tensors.
        where: What holds them, for messages.

    Raises:
        WrongStates: They are something else.
    """
    try:
        token_ids, states = tensors["token_ids"], tensors["hidden_states"]
    except KeyError as error:
        raise WrongStates(f"{where} holds no states: there is no {error}") from None
    if states.ndim != 3:
        raise WrongStates(f"{where} holds no states: hidden_states has shape {list(states.shape)}")
    if "hidden_states_scales" in tensors:
        states = states.float() * tensors["hidden_states_scales"]
    return ServedStates(token_ids, states)


def is_being_written(path: Path) -> bool:
    """Return whether a server holds the lock of a file."""
    for lock in (path.with_suffix(".lock"), lock_of(path)):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            return True
    return False


def lock_of(path: Path) -> Path:
    """Return the lock of a file of states."""
    return path.with_name(f"{path.name}.lock")


def require_states(found: ServedStates, tokens: npt.NDArray[np.int64], layers: Sequence[int], width: int) -> None:
    """Check that states are those of a row.

    Args:
        found: The states.
        tokens: The tokens of the row, int64 [T].
        layers: Ids of the layers.
        width: Width H of a state.

    Raises:
        WrongStates: They are not; the message names a likely cause.
    """
    if list(found.states.shape[1:]) != [len(layers), width]:
        raise WrongStates(
            f"the states have shape {list(found.states.shape)}, expected [{len(tokens)}, {len(layers)}, {width}] for "
            f"layers {list(layers)}; start the server with eagle_aux_hidden_state_layer_ids {engine_layer_ids(layers)}"
        )
    if len(found.states) < len(tokens):
        raise WrongStates(
            f"there are states of {len(found.states):,} of the {len(tokens):,} tokens of the row: with prefix caching, "
            "a server computes no states of cached tokens; start it with --no-enable-prefix-caching"
        )
    if len(found.states) != len(tokens) or not np.array_equal(found.token_ids.numpy(), tokens):
        raise WrongStates("the states are of other tokens than those of the request")
    if not torch.isfinite(found.states).all():
        raise WrongStates("the states are not all finite numbers; serve the verifier in a wider type (--dtype)")
