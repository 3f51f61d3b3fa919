"""The mask token: what the slots of a block read that are to be drafted."""

from __future__ import annotations

from specforge.data.module import DraftDataModule
from specforge.errors import UsageError

KEY = "model.draft.mask_token_id"


def check_in_table(token: int, size: int) -> None:
    """Refuse a mask token that the verifier has no embedding of.

    Args:
        token: Its id.
        size: Number V of the verifier's ids.

    Raises:
        UsageError: The id is none of them.
    """
    if token >= size:
        raise UsageError(f"{KEY} is {token}, but the verifier has ids 0 to {size - 1}; choose one that no text holds")


def unused_token(chosen: int | None, data: DraftDataModule) -> int:
    """Return a mask token that no text holds.

    Args:
        chosen: Its id; None for the first id of the verifier's table that the tokenizer has no token for, as the
            published drafts for Qwen3 have it (151669).
        data: The rows, set up.

    Raises:
        UsageError: A text holds it, or the tokenizer leaves none free.
    """
    token = _first_free(data) if chosen is None else chosen
    rows = [one for one in (data.train_rows, data.validation_rows, data.test_rows) if one is not None]
    if uses := sum(int(one.token_counts[token]) for one in rows):
        raise UsageError(
            f"{KEY} is {token}, which the texts hold {uses:,} times; choose a token that none holds: a draft has to "
            "tell it from what is decided"
        )
    return token


def _first_free(data: DraftDataModule) -> int:
    try:
        token = max(data.tokenizer.get_vocab().values()) + 1
    except UsageError as error:
        raise UsageError(f"{KEY} is not set, and cannot be found without the verifier's tokenizer: {error}") from None
    if token >= data.vocabulary_size:
        raise UsageError(
            f"{data.verifier} has no free token: its tokenizer uses all of its {data.vocabulary_size:,} ids; set {KEY} "
            "to the id of a token that no text holds, such as a reserved one or that of padding"
        )
    return token
