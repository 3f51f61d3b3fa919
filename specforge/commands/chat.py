"""Answers of ``specforge generate``, streamed to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from io import TextIOBase

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.text import Text

from specforge.checkpoints.run_record import find_draft
from specforge.commands.arguments import find_verifier, load, load_draft, sampling_of
from specforge.config import SpeculatorModelConfig
from specforge.data.text.chat import Message
from specforge.data.text.prompts import Conversation, read_prompts, reply_text
from specforge.data.text.showing import highlighted
from specforge.data.text.template import ChatTemplate
from specforge.decoding.loop import Decoder, Emission
from specforge.decoding.settings import Verification
from specforge.decoding.verification import is_lossy
from specforge.proposals.choice import choose_proposal


def answer_prompts(found: Namespace) -> None:
    """Answer the prompts that the arguments of ``specforge generate`` name, or those of the terminal."""
    if found.draft is not None:
        found.draft, _ = find_draft(found.draft)
    conversations = read_prompts(found.file, "--file") if found.file is not None else None
    decoder, template = _prepare(found)
    _Chat(found, decoder, template).run(conversations)


def _prepare(found: Namespace) -> tuple[Decoder, ChatTemplate]:
    config = None if found.draft is None else SpeculatorModelConfig.from_pretrained(found.draft)
    proposal = choose_proposal(found.proposal, config)
    sampling, verification = sampling_of(found), Verification(method=found.verification)
    verifier, template = load(found, find_verifier(found, [] if config is None else [config]))
    draft = None if found.draft is None else load_draft(found.draft, verifier)
    if is_lossy(verification, proposal):
        print("LOSSY: with these settings the text may differ from the verifier's own.", file=sys.stderr)
    return Decoder(verifier, draft, proposal, sampling, verification), template


class _Chat:
    """Prompts and replies on the terminal.

    Args:
        found: The command's settings.
        decoder: The decoder that answers.
        template: The verifier's chat template, with the tokenizer.
    """

    def __init__(self, found: Namespace, decoder: Decoder, template: ChatTemplate) -> None:
        self.settings = found
        self.decoder = decoder
        self.template = template
        self.console = Console(highlight=False, soft_wrap=True)
        self.notes = Console(stderr=True, highlight=False)

    def run(self, conversations: list[Conversation] | None) -> None:
        """Answer one prompt, a file of prompts, or prompts from the terminal."""
        if self.settings.prompt is not None:
            turn: list[Message] = [{"role": "user", "content": self.settings.prompt}]
            self._answer(Conversation((turn,), "--prompt"), [])
        elif conversations is not None:
            for conversation in conversations:
                self._answer_all(conversation)
        else:
            self._answer_typed()

    def _answer_all(self, conversation: Conversation) -> None:
        replies: list[str] = []
        for turn in conversation.turns:
            asked = [one["content"] for one in turn if isinstance(one, dict) and one["role"] == "user"]
            self.console.print(Text(f"> {' '.join(asked) or conversation.location}", style="bold"))
            self._answer(conversation, replies)

    def _answer_typed(self) -> None:
        turns: list[list[Message]] = []
        replies: list[str] = []
        for typed in _typed(sys.stdin):
            turns.append([{"role": "user", "content": typed}])
            self._answer(Conversation(tuple(turns), "the terminal"), replies)

    def _answer(self, conversation: Conversation, replies: list[str]) -> None:
        """Stream the reply to the next turn, and append it to the replies."""
        prompt = torch.tensor(conversation.prompt(len(replies), replies, self.template))
        emissions = []
        text = ""
        tokens: list[int] = []
        for emission in self.decoder.decode([prompt], self.settings.max_new_tokens, self.settings.seed):
            emissions.append(emission)
            text = self._show(tokens, text, emission)
        self.console.print()
        self._summarise(emissions)
        replies.append(reply_text(tokens, self.template.tokenizer))

    def _show(self, tokens: list[int], shown: str, emission: Emission) -> str:
        """Print the text added by a round, and return all text printed so far."""
        drafted = emission.path if self.settings.show_drafts else 0
        for part, is_drafted in ((emission.tokens[:drafted], True), (emission.tokens[drafted:], False)):
            tokens.extend(part)
            text = str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))
            # Incomplete bytes of a character decode to a replacement character; wait for later tokens.
            if text == shown or text.endswith("\ufffd"):
                continue
            added = text[len(shown) :]
            self.console.print(highlighted(added, self.console) if is_drafted else Text(added), end="")
            shown = text
        self.console.file.flush()
        return shown

    def _summarise(self, emissions: list[Emission]) -> None:
        rounds = [one for one in emissions if one.drafted is not None]
        times = self.decoder.times
        if not rounds or not times.total:
            return
        tokens = sum(len(one.tokens) for one in rounds)
        self.notes.print(
            f"[{tokens + 1} tokens; {tokens / len(rounds):.2f} tokens per verifier pass; "
            f"{tokens / times.total:.1f} tokens/s]",
            style="dim",
            markup=False,
        )


def _typed(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines until an empty one or the end; on a terminal, print a prompt sign."""
    interactive = isinstance(lines, TextIOBase) and lines.isatty()
    source = iter(lines)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = next(source, "").strip()
        if not line:
            return
        yield line
