"""Check of a server that extracts states: one row, asked twice, against the configuration and our own capture."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specforge.commands.configured import verifier_states
from specforge.data.features.served import ServedStates, WrongStates, require_states
from specforge.data.features.transports import Transport
from specforge.engines.client import Refused, Unanswered, request_id
from specforge.engines.pool import EndpointSettings, engines_of, served_model
from specforge.errors import SpecforgeError
from specforge.training.module import DraftModule

ROW_TOKENS = 64  # several blocks of a prefix cache
FIRST_TOKEN = 3  # after the special tokens of most vocabularies
LARGEST_ERROR = 0.1  # docs/engines.md has figures


@dataclass(frozen=True)
class Comparison:
    """Served states of one layer against our own.

    Attributes:
        layer: Id of the layer.
        error: Norm of a token's difference relative to its own state, the median over the tokens: the large states of
            a few tokens, attention sinks, round badly.
        nearest: Id of the layer whose states of ours are nearest.
    """

    layer: int
    error: float
    nearest: int


def ask_row(settings: EndpointSettings, transport: Transport) -> tuple[str, ServedStates]:
    """Ask an endpoint twice for the states of one row, so that a prefix cache shows.

    Args:
        settings: One endpoint and how it is used.
        transport: How the states come here.

    Returns:
        The name of the served model, and the states.

    Raises:
        SpecforgeError: It does not answer, or not with states of the row; the message names the fault.
    """
    try:
        return asyncio.run(_ask_row(settings, transport))
    except (Unanswered, Refused, WrongStates) as error:
        raise SpecforgeError(str(error)) from error
    except TimeoutError:
        raise SpecforgeError(f"the states were not written within {settings.timeout:g} seconds") from None


async def _ask_row(settings: EndpointSettings, transport: Transport) -> tuple[str, ServedStates]:
    tokens = np.arange(FIRST_TOKEN, FIRST_TOKEN + ROW_TOKENS)
    async with engines_of(settings) as engines:
        model = settings.model or await served_model(engines)
        for _ in range(2):
            parameters = await engines[0].extract(model, tokens.tolist(), request_id("specforge-doctor"))
            try:
                async with asyncio.timeout(settings.timeout):
                    found = await transport.receive(parameters)
            finally:
                transport.delete(parameters)
            # Without a configuration, any layers will do.
            require_states(found, tokens, range(found.states.shape[1]), found.states.shape[2])
        return model, found


def require_layers(found: ServedStates, module: DraftModule) -> None:
    """Check that the states are of as many layers, and as wide, as a configuration needs.

    Raises:
        SpecforgeError: They are not.
    """
    text = module.teacher.config.get_text_config()
    layers = sorted({*module.aux_layers, text.num_hidden_layers})
    try:
        require_states(found, found.token_ids.numpy(), layers, text.hidden_size)
    except WrongStates as error:
        raise SpecforgeError(str(error)) from error


def compare(found: ServedStates, module: DraftModule) -> list[Comparison]:
    """Compare the states with our own capture; the verifier is loaded on first use.

    Raises:
        UsageError: The verifier cannot be loaded.
    """
    text = module.teacher.config.get_text_config()
    ids = found.token_ids[None]
    positions = torch.arange(ids.shape[1])[None]
    own = verifier_states(module.teacher, list(range(text.num_hidden_layers)), ids, positions)[0].float().cpu()
    layers = sorted({*module.aux_layers, text.num_hidden_layers})
    return [_compared(layer, served.float(), own) for layer, served in zip(layers, found.states.unbind(1), strict=True)]


def wrong_layers(compared: Sequence[Comparison]) -> str | None:
    """Return what is wrong with compared states; None if nothing is."""
    shifted = {one.layer: one.nearest for one in compared if one.nearest != one.layer}
    if shifted:
        return f"the server's states are those of other layers (ours: its): {shifted}; check the order of its layer ids"
    largest = max(compared, key=lambda one: one.error)
    if largest.error > LARGEST_ERROR:
        return (
            f"the states of layer {largest.layer} differ from our own capture by {largest.error:.1%}: the server has "
            "another verifier, revision or type"
        )
    return None


def _compared(layer: int, served: Tensor, own: Tensor) -> Comparison:
    errors = ((own - served[:, None]).norm(dim=2) / own.norm(dim=2)).median(0).values
    return Comparison(layer, float(errors[layer]), int(errors.argmin()))
