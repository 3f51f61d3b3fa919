"""``model.draft.draft_vocab_size``: the tokens that a draft can propose, chosen by how often they are supervised."""

from __future__ import annotations

from specforge.data.module import DraftDataModule
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.models.vocabulary import DraftVocabulary


def check_size(size: int | None, verifier_size: int) -> None:
    """Refuse a draft vocabulary that is larger than the verifier's.

    Args:
        size: The setting; None for all tokens.
        verifier_size: Number V of the verifier's tokens.

    Raises:
        UsageError: The setting is larger.
    """
    if size is not None and size > verifier_size:
        raise UsageError(
            f"model.draft.draft_vocab_size is {size}, but the verifier has only {verifier_size} tokens; give at most "
            "that, or null for all of them"
        )


def chosen_vocabulary(size: int | None, verifier_size: int, data: DraftDataModule) -> DraftVocabulary | None:
    """Return the most frequent tokens of the data; None if the draft can propose all tokens.

    Args:
        size: The setting; None for all tokens.
        verifier_size: Number V of the verifier's tokens.
        data: The data, set up.
    """
    return None if size in (None, verifier_size) else DraftVocabulary.most_frequent(data.vocabulary_counts(), size)


def coverage_text(draft: SpeculatorModel, data: DraftDataModule) -> str:
    """Return a sentence on the share of the supervised tokens that a draft can propose.

    Args:
        draft: The draft, attached to its verifier.
        data: The data, set up.
    """
    counts, ids = data.vocabulary_counts(), draft.draft_ids
    covered = counts if ids is None else counts[ids.cpu()]
    share = float(covered.sum() / counts.sum().clamp(min=1))
    return f"{len(covered):,} draft tokens cover {share:.1%} of the supervised ones"
