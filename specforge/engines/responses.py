"""A folder of responses: rows in the order of the prompts, and a summary; there whole or not at all.

What is finished lies in a hidden neighbour until all is: a run that was ended in any way is taken up by the same
command, and the rows are those of a run that was not.
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
from specforge.engines.asking import Answer, Prompt, Reply, read_asked
from specforge.engines.journal import Journal, ReplyTally
from specforge.errors import SpecforgeError, UsageError
from specforge.files import locked, whole_file

RESPONSES_FILE = "responses.jsonl"
SUMMARY_FILE = "summary.json"
_SETTINGS_FILE = "settings.json"
_JOURNAL_FILE = "journal.jsonl"
_log = logging.getLogger(__name__)


@dataclass
class Responses:
    """What a folder of responses holds.

    Attributes:
        settings: All that the rows depend on.
        origin: What the rows say of who wrote them.
        tally: What was written.
        refused: Conversations that could not be answered, by place, and why; they are left out.
        notes: What else is to be stored beside the rows.
    """

    settings: dict[str, Any]
    origin: dict[str, Any]
    tally: ReplyTally
    refused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the summary of a folder; None where it is none of responses."""
        try:
            values = json.loads((folder / SUMMARY_FILE).read_text())
            return cls(**{**values, "tally": ReplyTally.from_json(values["tally"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**vars(self), "tally": self.tally.to_json()}


def check_output(output: Path) -> Responses | None:
    """Return what an output folder holds; None where it is yet to be written.

    Raises:
        UsageError: Something else is there, or the name is one of a file.
    """
    if not output.name or output.suffix in (".jsonl", ".json"):
        raise UsageError(f"--output: {output} is no name for a folder; give one, the rows are OUTPUT/{RESPONSES_FILE}")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    there = Responses.read(output)
    if there is None:
        raise UsageError(f"--output: {output} holds something else; choose another folder, or remove it")
    return there


def write_responses(
    sources: Sequence[str],
    limit: int | None,
    settings: dict[str, Any],
    output: Path,
    answer: Answer,
    conclude: Callable[[Journal], tuple[dict[str, Any], dict[str, Any]]],
) -> Responses:
    """Let prompts be answered, and write the folder, unless it is there already.

    Args:
        sources: Prompts, one after the other.
        limit: Only so many of them; None for all.
        settings: All that the rows depend on, by the names of flags; another run with others is refused.
        output: The folder.
        answer: Answers.
        conclude: Says at the end who wrote the rows (``origin``), and what else is to be noted.

    Raises:
        UsageError: There are no prompts, too many rows hold none, or the folder holds something else, or an unfinished
            run with other settings.
        SpecforgeError: Another process writes the folder, it cannot be written, or the answers fail.
    """
    check_output(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with locked(output):
            if there := check_output(output):
                _require_same(there.settings, settings, f"{output} holds responses")
                shutil.rmtree(partial, ignore_errors=True)
                return there
            _bind(partial, settings)
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
            f"cannot write {output}: {error.strerror or error}; what is answered so far stays in {partial}: mend that "
            "and run the same command again, and it goes on from there"
        ) from error


def _answer_all(
    sources: Sequence[str],
    limit: int | None,
    settings: dict[str, Any],
    partial: Path,
    answer: Answer,
    conclude: Callable[[Journal], tuple[dict[str, Any], dict[str, Any]]],
) -> Responses:
    """Answer what is not answered yet, and put all of it into ``partial/whole``."""
    # All are read once before the first is asked: bad lines would otherwise show after hours.
    total, refused = 0, dict[str, str]()
    for one in read_asked(sources, limit):
        total += 1
        if isinstance(one, BadRow):
            refused[one.location] = one.explanation
    if not total:
        raise UsageError(f"{', '.join(sources)}: holds no prompts")
    _require_few_bad(refused, total)
    with Journal(partial / _JOURNAL_FILE) as journal:
        if journal.finished:
            _log.warning("going on after %s conversations of an earlier run", f"{len(journal.finished):,}")
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
            asked = (one for one in read_asked(sources, limit) if isinstance(one, Prompt))
            answer((one for one in asked if one.index not in earlier), keep, refuse)
        if not journal.finished:
            where, why = next(iter(refused.items()))
            raise SpecforgeError(f"none of the {total:,} prompts was answered; the first one, {where}: {why}")
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
            f"first one is {where}: {why}"
        )


def _bind(partial: Path, settings: dict[str, Any]) -> None:
    """Make the hidden neighbour, or make sure that it is of a run with the same settings."""
    path = partial / _SETTINGS_FILE
    if _holds_answers(partial):
        _require_same(json.loads(path.read_text()), settings, f"{partial} holds an unfinished run")
        return
    with whole_file(path) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n")


def _holds_answers(partial: Path) -> bool:
    journal = partial / _JOURNAL_FILE
    return journal.exists() and journal.stat().st_size > 0


def _require_same(there: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    differing = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
    if differing:
        named = ", ".join(f"{name} ({there.get(name)} there, {settings.get(name)} now)" for name in differing)
        raise UsageError(f"--output: {what} with other settings: {named}; use those, or choose another --output")
