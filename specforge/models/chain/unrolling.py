"""Training-time test (EAGLE-3) and HASS: each step of a chain reads the features that the previous step predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.models.chain.alignment import step_tokens
from specforge.models.chain.drafter import FeatureNetwork
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows


def run_chain(
    network: FeatureNetwork,
    input_ids: Tensor,
    feature: Tensor,
    position_ids: Tensor,
    rows: DraftRows,
    first_position: int,
    detached: bool = False,
) -> Tensor:
    """Run the steps of a chain at the rows that are needed, fed with the true tokens.

    Rows are those of ``specforge.models.chain.alignment``: row t at step k reads token x_{t+1+k}, and the verifier's
    feature of token t (step 0) or its own state of step k - 1.

    Args:
        network: The draft network.
        input_ids: The verifier's tokens x, [B, T].
        feature: The verifier's feature for the first step, [B, T, H].
        position_ids: Positions that restart at 0 with each document, [B, T].
        rows: The rows that each step runs.
        first_position: Position of row 0 at step 0, as in drafting.
        detached: Whether to stop gradients through the states that are fed back.

    Returns:
        The network's states, concatenated step by step, [P, H] for P pairs of row and step (see
        ``DraftRows.state_index``).
    """
    attention = TrainingTimeTest(rows)
    tokens = step_tokens(input_ids, len(rows.counts)).flatten(1)[:, None, rows.order]
    positions = position_ids.flatten()[None, rows.order] + first_position
    read = feature.flatten(0, 1)[None, rows.order]
    states = []
    for step, count in enumerate(rows.counts):
        # Step 0 reads all rows, because they are attended to.
        read = read if step == 0 else read[:, :count]
        own = slice(read.shape[1])
        states.append(network.advance(tokens[step, :, own], read, positions[:, own] + step, attention.at(step), count))
        read = network.fed_back(states[-1].detach() if detached else states[-1])
    return torch.cat(states, dim=1)[0]
