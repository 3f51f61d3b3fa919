"""``specforge prepare responses``: generate the verifier's own answers to prompts, for a draft to learn from."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specforge.commands.arguments import (
    answering_parser,
    load,
    loading_of,
    parse,
    sampling_of,
    template_words,
    verifier_text,
)
from specforge.commands.endpoints import chosen_transport
from specforge.commands.prepare.check import check_rows, print_check
from specforge.data.text.records import RawRecord
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specforge.data.features.answers import AnswerRecorder
    from specforge.data.text.template import ChatTemplate
    from specforge.engines.answering import EndpointAnswerer
    from specforge.engines.generation import Answer, GenerationSettings, Keep, Prompt, Refuse
    from specforge.engines.journal import Journal
    from specforge.engines.responses import Responses
    from specforge.verifier.on_policy import PolicyCheck

DESCRIPTION = """\
Let the verifier answer prompts again, turn by turn: a draft has to predict its verifier's text, not text from another
source. The verifier answers in this process, or through any engine with OpenAI's chat completions (vLLM, SGLang,
transformers serve). An interrupted run resumes when the same command is run again.

  specforge prepare responses prompts.jsonl --verifier MODEL --output responses
  specforge prepare responses chats.jsonl --endpoint http://localhost:8000/v1 \\
    --temperature 0.7 --output responses
  specforge prepare responses chats.jsonl --endpoint URL_A URL_B \\
    --concurrency 256 --verifier MODEL --output responses
  specforge prepare responses chats.jsonl --endpoint URL --record fit.yaml \\
    --output responses

With --record, a vLLM server as started by serve-verifier also keeps the states of prompts and answers, which are stored
in --output/features: answers and features in one pass.

A prompt is a row with turns, messages (their replies are dropped), ShareGPT conversations, prompt, or input_ids and
loss_mask. An API key is read from OPENAI_API_KEY.

Writes --output/responses.jsonl, in the order of the prompts, and summary.json."""


def run(arguments: list[str]) -> int:
    """Generate the responses, and print a summary."""
    found = parse(command_line(), arguments)
    _check_flags(found)
    from specforge.data.text.sources import source_fingerprint
    from specforge.engines.generation import GenerationSettings
    from specforge.engines.responses import write_responses

    generation = GenerationSettings(
        sampling_of(found), found.max_new_tokens, found.seed, found.template_arguments or {}
    )
    verifier = _Verifier(found)
    identity = verifier.identity if found.verifier else {}
    answer, name, model = verifier.answerer(generation), found.verifier, identity
    recorder = _recorder(found) if found.record else None
    if found.endpoint:
        endpoints = _endpoints(found, generation, verifier.vocabulary_size if found.verifier else None, recorder)
        answer, name, model = endpoints.answer, endpoints.model, {"model": endpoints.model}
    decoding = {
        **generation.sampling.model_dump(),
        "max_new_tokens": generation.max_new_tokens,
        "seed": generation.seed,
    }
    settings = {
        "prompts": [source_fingerprint(source) for source in found.sources],
        "limit": found.limit,
        **model,
        **decoding,
        **verifier.rendering,
    }
    if recorder is not None:
        settings["record"] = recorder.store.manifest.name

    def conclude(journal: Journal) -> tuple[dict[str, Any], dict[str, Any]]:
        check = verifier.check(journal, generation) if found.verifier and found.check else None
        doubt = _doubt(found, journal, check)
        if recorder is not None:
            recorder.store.publish()
        origin = {
            "model": name if doubt is None else f"{name} ({doubt})",
            "fingerprint": "" if doubt is not None else identity["verifier"],
            **decoding,
            **verifier.rendering,
            "template": identity.get("template"),
            "revision": found.verifier_revision,
        }
        return origin, {"doubt": doubt, "check": None if check is None else vars(check)}

    responses = write_responses(found.sources, found.limit, settings, Path(found.output), answer, conclude)
    _print(responses, Console(highlight=False))
    print(f"\n{_closing_line(found)}")
    return 0


class _Verifier:
    """The named verifier, whose parts are loaded on use."""

    def __init__(self, found: Namespace) -> None:
        self._found = found
        self._text = verifier_text(found, found.verifier)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Fields that identify the verifier."""
        from specforge.verifier.fingerprint import fingerprint

        template = str(self._text.template.tokenizer.chat_template or "")
        return {
            "verifier": fingerprint(self._found.verifier, loading_of(self._found)),
            "verifier_dtype": self._found.verifier_dtype,
            "template": hashlib.sha256(template.encode()).hexdigest()[:16],
        }

    @property
    def rendering(self) -> dict[str, Any]:
        """Settings with which the prompts are rendered."""
        date = self._found.template_date
        if self._found.verifier and not self._found.endpoint and self._text.template.prints_date:
            date = self._text.template.date
        return {"template_arguments": self._found.template_arguments or {}, "template_date": date}

    @property
    def vocabulary_size(self) -> int:
        """Size of the vocabulary in its configuration."""
        return self._text.vocabulary_size

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, ChatTemplate]:
        """The loaded verifier and its chat template."""
        return load(self._found, self._found.verifier)

    def answerer(self, generation: GenerationSettings) -> Answer:
        """Return a function that answers prompts; the verifier is loaded when it is called."""

        def answer(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
            from specforge.commands.prepare.in_process import InProcessAnswerer

            InProcessAnswerer(*self.loaded, generation, self._found.batch_size).answer(prompts, keep, refuse)

        return answer

    def check(self, journal: Journal, generation: GenerationSettings) -> PolicyCheck | None:
        """Check evenly spaced rows against the verifier."""
        step = max(journal.tally.rows // self._found.check, 1)
        rows = islice(journal.rows(), 0, step * self._found.check, step)
        origin = {"model": self._found.verifier, "fingerprint": "", **generation.sampling.model_dump()}
        records = (RawRecord({**row, "origin": origin}, f"response {step * n + 1}") for n, row in enumerate(rows))
        return check_rows(*self.loaded, records)


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = answering_parser(
        "prepare responses",
        "PROMPTS ... --output FOLDER (--verifier MODEL | --endpoint URL)",
        DESCRIPTION,
        max_new_tokens=1024,
        verifier="Folder or hub id. With --endpoint only to check that the engine serves it; it must fit in memory.",
    )
    parser.add_argument(
        "sources", type=str, nargs="*", metavar="PROMPTS", help="Files, folders or hub data sets with prompts."
    )
    parser.add_argument("--output", type=str | None, default=None, metavar="FOLDER", help="Folder to write; required.")
    parser.add_argument("--limit", type=PositiveInt | None, default=None, metavar="N", help="Answer at most N prompts.")
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=16, metavar="N", help="In process: number of answers in a batch."
    )
    parser.add_argument(
        "--endpoint",
        type=str,
        nargs="+",
        default=[],
        metavar="URL",
        help="URLs of engines, such as http://localhost:8000/v1.",
    )
    parser.add_argument(
        "--model", type=str | None, default=None, metavar="NAME", help="The engines' name for the verifier."
    )
    parser.add_argument(
        "--concurrency", type=PositiveInt, default=64, metavar="N", help="Total number of conversations in flight."
    )
    parser.add_argument(
        "--max_failures",
        type=PositiveInt,
        default=8,
        metavar="N",
        help="Number of consecutive failed requests after which an engine is dropped for a while.",
    )
    parser.add_argument(
        "--retries",
        type=NonNegativeInt,
        default=4,
        metavar="N",
        help="Retries of a request before it has failed.",
    )
    parser.add_argument(
        "--timeout", type=PositiveFloat, default=600.0, metavar="SECONDS", help="Maximum time for an answer."
    )
    parser.add_argument(
        "--record",
        type=str | None,
        default=None,
        metavar="CONFIG",
        help="Configuration of specforge fit whose states are stored, too; needs --endpoint.",
    )
    parser.add_argument(
        "--transport",
        type=str | None,
        default=None,
        metavar="NAME",
        help="How states come from servers (see specforge plugins); by default as --record says.",
    )
    parser.add_argument(
        "--check",
        type=NonNegativeInt,
        default=16,
        metavar="N",
        help="Number of rows to check for being the verifier's own; 0: none.",
    )
    return parser


def _check_flags(found: Namespace) -> None:
    if not found.sources:
        raise UsageError("sources: none are given; name at least one file, folder or hub data set with prompts")
    if not found.output:
        raise UsageError("output: is required; give it as --output, or in the file of --config")
    if not found.verifier and not found.endpoint:
        raise UsageError("no verifier is given; give --verifier MODEL, or --endpoint URL for an engine that serves it")
    if found.record and not found.endpoint:
        raise UsageError(
            "--record needs --endpoint; in this process, answer first and then run specforge prepare features"
        )
    from specforge.data.text.sources import check_source
    from specforge.engines.responses import check_output

    for source in found.sources:
        check_source(source, "sources")
    check_output(Path(found.output))


def _recorder(found: Namespace) -> AnswerRecorder:
    """Return what stores the states that a configuration of ``fit`` reads."""
    # Training takes seconds to import.
    from specforge.commands.configured import module_and_data
    from specforge.data.features.answers import AnswerRecorder
    from specforge.data.features.growing import GrowingStore
    from specforge.engines.responses import features_folder

    # The rows that the configuration names may be those that are about to be written.
    words = ["--config", found.record, "--data.validation", "null", "--data.test", "null"]
    if found.verifier:
        words += ["--verifier", found.verifier]
    if found.verifier_revision:
        words += ["--verifier_revision", found.verifier_revision]
    module, data = module_and_data(words, found.sources[:1])
    needs = module.feature_needs
    if needs.whole_rows or needs.row_ends:
        raise UsageError(
            f"--record: {found.record} trains on the state of a row's last token (supervision: all or compat), which "
            "an engine does not compute while it answers; use specforge prepare features"
        )
    output = Path(found.output)
    store = GrowingStore(features_folder(output), data.feature_manifest(needs, "bfloat16"))
    tag = "specforge-" + hashlib.sha256(str(output.absolute()).encode()).hexdigest()[:12]
    longest = data.row_settings.max_length
    return AnswerRecorder(store, chosen_transport(found.transport, data), tag, longest, found.timeout)


def _endpoints(
    found: Namespace, generation: GenerationSettings, vocabulary: int | None, recorder: AnswerRecorder | None
) -> EndpointAnswerer:
    # The client takes a second to import.
    from specforge.engines.answering import EndpointAnswerer
    from specforge.engines.pool import EndpointSettings

    settings = EndpointSettings(
        found.endpoint, found.model, found.concurrency, found.max_failures, found.retries, found.timeout, vocabulary
    )
    return EndpointAnswerer(settings, generation, recorder)


def _doubt(found: Namespace, journal: Journal, check: PolicyCheck | None) -> str | None:
    """Return why the rows may not be exactly the verifier's tokens; None if they are."""
    if check is not None and not check.is_own:
        return "the check found that the responses are not this verifier's"
    if not found.endpoint:
        return None
    if check is None:
        return "not checked against a verifier" if found.verifier else "no verifier is given to check against"
    if journal.tally.with_tokens < journal.tally.conversations:
        return "the engine returns no token ids, so the tokens are known only through their text"
    return None


def _print(responses: Responses, console: Console) -> None:
    tally = responses.tally
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_row("conversations", f"{tally.conversations:,}")
    table.add_row("rows", f"{tally.rows:,}")
    table.add_row("replies", f"{tally.replies:,}")
    table.add_row("generated tokens", f"{tally.tokens:,}")
    for reason, number in sorted(tally.finishes.items()):
        table.add_row(f"replies that ended by {reason}", f"{number:,}")
    table.add_row("rejected prompts", f"{len(responses.refused):,}")
    table.add_row(
        "rows with token ids", "all" if tally.with_tokens == tally.conversations else f"{tally.with_tokens:,}"
    )
    console.print(table)
    for location, reason in islice(responses.refused.items(), 3):
        console.print(Text(f"rejected: {location}: {reason}", style="yellow"))
    if responses.notes["check"]:
        from specforge.verifier.on_policy import PolicyCheck

        print_check(PolicyCheck(**responses.notes["check"]), console)
    if doubt := responses.notes["doubt"]:
        console.print(
            Text(f"Acceptance lengths on these rows will be labelled as a proxy: {doubt}.", style="yellow"),
            soft_wrap=True,
        )


def _closing_line(found: Namespace) -> str:
    from specforge.engines.responses import FEATURES, RESPONSES_FILE

    rows = Path(found.output) / RESPONSES_FILE
    if found.record:
        features = Path(found.output) / FEATURES
        words = ["specforge", "fit", "--config", found.record, "--data.train", str(rows)]
        words += ["--data.features", str(features), *template_words(found, "data.")]
        return f"Done: {rows} holds the responses, {features} their states. Next:\n  {shlex.join(words)}"
    words = ["specforge", "prepare", "rows", str(rows), "--verifier", found.verifier or "MODEL", "--output", "rows"]
    words += template_words(found)
    unknown = "" if found.verifier else ", with the verifier as MODEL"
    return f"Done: {rows} holds the responses, summary.json a summary. Next{unknown}:\n  {shlex.join(words)}"
