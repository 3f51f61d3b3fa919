"""The mask token: what the slots of a block read that are to be drafted."""

from __future__ import annotations

from specforge.data.module import DraftDataModule
from specforge.errors import UsageError

KEY = "model.draft.mask_token_id"


def mask_token(chosen: int | None, data: DraftDataModule) -> int:
    """Return the mask token.

    Args:
        chosen: Its id; None for the first id of the verifier's table that the tokenizer has no token for, as the
            published drafts for Qwen3 have it (151669).
        data: The training data, set up.

    Raises:
        UsageError: The id is not in the verifier's table, or a text holds it; or the tokenizer leaves none free.
    """
    size = data.vocabulary_size
    if chosen is None:
        free = _first_free(data)
        if free >= size:
            raise UsageError(
                f"{data.verifier} has no free token: its tokenizer uses all of its {size:,} ids; set {KEY} to the id "
                "of a token that no text holds, such as a reserved one or that of padding"
            )
        chosen = free
    elif chosen >= size:
        raise UsageError(f"{KEY} is {chosen}, but the verifier has ids 0 to {size - 1}; choose one that no text holds")
    uses = sum(int(rows.token_counts[chosen]) for rows in (data.train_rows, data.validation_rows) if rows is not None)
    if uses:
        raise UsageError(
            f"{KEY} is {chosen}, which the texts hold {uses:,} times; choose a token that none holds: a draft has to "
            "tell it from what is decided"
        )
    return chosen


def _first_free(data: DraftDataModule) -> int:
    try:
        return max(data.tokenizer.get_vocab().values()) + 1
    except UsageError as error:
        raise UsageError(f"{KEY} is not set, and cannot be found without the verifier's tokenizer: {error}") from None
