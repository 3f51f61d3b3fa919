"""A folder of responses: rows in the order of the prompts, and a summary, written atomically.

Finished conversations are kept in a hidden folder next to it until all are finished. An interrupted run is resumed by
the same command and gives the same rows as an undisturbed one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from specforge.data.rows.summary import MAX_BAD_SHARE
from specforge.data.text.bad_rows import BadRow
from specforge.engines.generation import Answer, Prompt, Reply, iter_prompts
from specforge.engines.journal import Journal, ReplyTally
from specforge.errors import SpecforgeError, UsageError
from specforge.files import locked, whole_file

RESPONSES_FILE = "responses.jsonl"
SUMMARY_FILE = "summary.json"
FEATURES = "features"
_SETTINGS_FILE = "settings.json"
_JOURNAL_FILE = "journal.jsonl"
_log = logging.getLogger(__name__)


@dataclass
class Responses:
    """Contents of a folder of responses.

    Attributes:
        settings: Everything that the rows depend on.
        origin: The ``origin`` of the rows.
        tally: Counts of the written replies.
        refused: Reasons of conversations that could not be answered, by location; they are left out.
        notes: Additional values to store in the summary.
    """

    settings: dict[str, Any]
    origin: dict[str, Any]
    tally: ReplyTally
    refused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the summary of a folder; None if it is not a folder of responses."""
        try:
            values = json.loads((folder / SUMMARY_FILE).read_text())
            return cls(**{**values, "tally": ReplyTally.from_json(values["tally"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return {**vars(self), "tally": self.tally.to_json()}


def features_folder(output: Path) -> Path:
    """Return the folder for states of the responses while they are written; it becomes ``output / FEATURES``."""
    return _partial(output) / "whole" / FEATURES


def check_output(output: Path) -> Responses | None:
    """Return the contents of an output folder; None if it is yet to be written.

    Raises:
        UsageError: The folder holds something else, or the name is a file name.
    """
    if not output.name or output.suffix in (".jsonl", ".json"):
        raise UsageError(f"--output: {output} is not a folder name; give one, the rows will be OUTPUT/{RESPONSES_FILE}")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    existing = Responses.read(output)
    if existing is None:
        raise UsageError(f"--output: {output} holds something else; choose another folder, or remove it")
    return existing


def write_responses(
    sources: Sequence[str],
    limit: int | None,
    settings: dict[str, Any],
    output: Path,
    answer: Answer,
    conclude: Callable[[Journal], tuple[dict[str, Any], dict[str, Any]]],
) -> Responses:
    """Answer prompts and write the folder, unless it already exists.

    Args:
        sources: Paths or hub names of prompts, read in this order.
        limit: Maximum number of prompts; None for all.
        settings: Everything that the rows depend on, by flag name; a run with other settings is refused.
        output: The folder.
        answer: Answers the prompts.
        conclude: Returns, at the end, the rows' ``origin`` and the notes to store.

    Raises:
        UsageError: There are no prompts, too many rows hold none, or the folder holds something else or a run with
            other settings.
        SpecforgeError: Another process is writing the folder, it cannot be written, or prompts were not answered.
    """
    check_output(output)
    partial = _partial(output)
    try:
        with locked(output):
            if existing := check_output(output):
                _require_same(existing.settings, settings, f"{output} holds responses")
                shutil.rmtree(partial, ignore_errors=True)
                return existing
            _open_partial(partial, settings)
            try:
                responses = _answer_all(sources, limit, settings, partial, answer, conclude)
            finally:
                if not _holds_answers(partial):
                    shutil.rmtree(partial, ignore_errors=True)
            (partial / "whole").replace(output)
            shutil.rmtree(partial)
            return responses
    except OSError as error:
        raise SpecforgeError(
            f"cannot write {output}: {error.strerror or error}; finished conversations are kept in {partial}: fix this "
            "and run the same command again to resume"
        ) from error


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def _answer_all(
    sources: Sequence[str],
    limit: int | None,
    settings: dict[str, Any],
    partial: Path,
    answer: Answer,
    conclude: Callable[[Journal], tuple[dict[str, Any], dict[str, Any]]],
) -> Responses:
    """Answer the remaining prompts and write everything into ``partial/whole``."""
    # Read all prompts before asking the first: a bad line must not show only after hours.
    total, refused = 0, dict[str, str]()
    for one in iter_prompts(sources, limit):
        total += 1
        if isinstance(one, BadRow):
            refused[one.location] = one.explanation
    if not total:
        raise UsageError(f"{', '.join(sources)}: holds no prompts")
    _require_few_bad(refused, total)
    with Journal(partial / _JOURNAL_FILE) as journal:
        if journal.finished:
            _log.warning("resuming after %s conversations of an earlier run", f"{len(journal.finished):,}")
        # disable=None shows the bar on a terminal only.
        done = len(journal.finished) + len(refused)
        with tqdm(total=total, initial=done, unit=" conversations", disable=None) as bar:

            def keep(answered: Sequence[tuple[Prompt, list[Reply]]]) -> None:
                journal.append(answered)
                bar.set_postfix_str(f"{journal.tally.tokens:,} tokens")
                bar.update(len(answered))

            def refuse(prompt: Prompt, reason: str) -> None:
                refused[prompt.conversation.location] = reason
                bar.update()

            earlier = set(journal.finished)
            asked = (one for one in iter_prompts(sources, limit) if isinstance(one, Prompt))
            answer((one for one in asked if one.index not in earlier), keep, refuse)
        if not journal.finished:
            where, why = next(iter(refused.items()))
            raise SpecforgeError(f"none of the {total:,} prompts was answered; the first, {where}: {why}")
        origin, notes = conclude(journal)
        responses = Responses(settings, origin, journal.tally, refused, notes)
        whole = partial / "whole"
        whole.mkdir(exist_ok=True)
        with (whole / RESPONSES_FILE).open("w", encoding="utf-8") as file:
            for row in journal.rows():
                file.write(json.dumps({"origin": origin, **row}, ensure_ascii=False) + "\n")
        (whole / SUMMARY_FILE).write_text(json.dumps(responses.to_json(), indent=2) + "\n")
    return responses


def _require_few_bad(bad: dict[str, str], total: int) -> None:
    if len(bad) > MAX_BAD_SHARE * total:
        where, why = next(iter(bad.items()))
        raise UsageError(
            f"{len(bad):,} of {total:,} rows hold no prompt, and at most {MAX_BAD_SHARE:.0%} may be left out; the "
            f"first is {where}: {why}"
        )


def _open_partial(partial: Path, settings: dict[str, Any]) -> None:
    """Create the hidden folder, or check that its run has the same settings."""
    path = partial / _SETTINGS_FILE
    if _holds_answers(partial):
        _require_same(json.loads(path.read_text()), settings, f"{partial} holds an unfinished run")
        return
    with whole_file(path) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n")


def _holds_answers(partial: Path) -> bool:
    journal = partial / _JOURNAL_FILE
    return journal.exists() and journal.stat().st_size > 0


def _require_same(stored: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    differing = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    if differing:
        named = ", ".join(f"{name} ({stored.get(name)} stored, {settings.get(name)} now)" for name in differing)
        raise UsageError(f"--output: {what} with other settings: {named}; use those, or choose another --output")
