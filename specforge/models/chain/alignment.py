"""The token, the target and the supervised positions of each step of a chain: the index equation of drafting.

For a document x_0 .. x_{L-1} with verifier states g_t (features) and y_t (last states), row t at step k = 0, 1, ...

* holds the feature of token t (step 0: made from g_t; later: the draft's own output at row t of step k - 1),
* reads the true token x_{t+1+k},
* * is compared with the verifier's distribution from y_{t+1+k}, which predicts x_{t+2+k},
* counts if x_{t+1}, ..., x_{t+2+k} are all response tokens of one turn: only then can a decoding round that starts at
  t reach it. Row t itself may hold the last token of the prompt.

``compat`` counts positions like the published trainers instead: those whose token t + k is a response token. It starts
one row late, and crosses from one turn to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Supervision = Literal["exact", "compat"]


@dataclass(frozen=True)
class Alignment:
    """Targets of every row and step.

    Attributes:
        targets: Index of the target's state in the flattened batch [B * T], int64 [S, B, T].
        supervised: Whether each row counts at each step, bool [S, B, T].
    """

    targets: Tensor
    supervised: Tensor


def step_tokens(input_ids: Tensor, steps: int) -> Tensor:
    """Return the tokens read at each step, [S, B, T]: x_{t+1+k} at row t; 0 past the end of the packed row."""
    length = input_ids.shape[1]
    padded = F.pad(input_ids, (0, steps))
    return torch.stack([padded[:, 1 + step : 1 + step + length] for step in range(steps)])


def align(loss_mask: Tensor, document_ids: Tensor, steps: int, supervision: Supervision = "exact") -> Alignment:
    """Return the targets and the supervised rows of every step.

    Args:
        loss_mask: Whether x_t is a response token, bool [B, T].
        document_ids: Which document a token belongs to, -1 for padding, [B, T].
        steps: Number S of steps.
        supervision: ``"exact"`` or ``"compat"``, see above.
    """
    batch, length = loss_mask.shape
    rows = torch.arange(batch * length, device=loss_mask.device).view(batch, length)
    targets = torch.stack([(rows + 1 + step).clamp(max=rows.numel() - 1) for step in range(steps)])
    rule = _exact if supervision == "exact" else _compat
    return Alignment(targets, rule(loss_mask, document_ids, steps))


def _exact(loss_mask: Tensor, document_ids: Tensor, steps: int) -> Tensor:
    # Turns are separated by tokens that the template adds, so an unbroken run of response tokens is one turn.
    within = [_same_document(loss_mask, document_ids, ahead) for ahead in range(1, steps + 2)]
    return torch.stack(within).cummin(dim=0).values[1:]


def _compat(loss_mask: Tensor, document_ids: Tensor, steps: int) -> Tensor:
    has_target = torch.ones_like(loss_mask)
    here = [_same_document(loss_mask, document_ids, step) for step in range(steps)]
    target = [_same_document(has_target, document_ids, 1 + step) for step in range(steps)]
    return torch.stack(here) & torch.stack(target)


def _same_document(flags: Tensor, document_ids: Tensor, ahead: int) -> Tensor:
    """Return, for each t, the flag of token t + ahead if it is in the same document, else False."""
    length = flags.shape[1]
    flag = F.pad(flags, (0, ahead))[:, ahead : ahead + length]
    document = F.pad(document_ids, (0, ahead), value=-1)[:, ahead : ahead + length]
    return flag & (document == document_ids) & (document_ids >= 0)
