"""The verifier answers in this process, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from transformers import PreTrainedModel

from specforge.data.text.prompts import Conversation, reply_text
from specforge.data.text.template import ChatTemplate
from specforge.decoding.checks import context_length
from specforge.decoding.loop import Decoder
from specforge.engines.generation import GenerationSettings, Keep, Prompt, Refuse, Reply
from specforge.errors import UsageError


class VerifierAnswerer:
    """Lets a loaded verifier answer.

    Args:
        verifier: The verifier.
        template: Its chat template, with the tokenizer.
        generation: Settings of its generation.
        batch_size: Conversations side by side.
    """

    def __init__(
        self, verifier: PreTrainedModel, template: ChatTemplate, generation: GenerationSettings, batch_size: int
    ) -> None:
        self.template = template
        self.generation = generation
        self.batch_size = batch_size
        self.decoder = Decoder(verifier, sampling=generation.sampling)
        self._context = context_length(verifier)

    def answer(self, prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
        """Answer conversations.

        A batch is made of neighbours by their place alone, so that a run that is taken up again makes the same ones,
        to the last bit; ``keep`` takes a batch as a whole.

        Args:
            prompts: The conversations, in order.
            keep: Takes those that are finished.
            refuse: Takes those that leave no room in the verifier's context, or that the chat template refuses.
        """
        for _, batch in groupby(prompts, key=lambda prompt: prompt.index // self.batch_size):
            if finished := self._converse(list(batch), refuse):
                keep(finished)

    def _converse(self, batch: list[Prompt], refuse: Refuse) -> list[tuple[Prompt, list[Reply]]]:
        """Answer a batch turn by turn."""
        replies: dict[int, list[Reply]] = {prompt.index: [] for prompt in batch}
        for turn in range(max(len(prompt.conversation.turns) for prompt in batch)):
            asked: list[tuple[Prompt, list[int]]] = []
            for prompt in batch:
                if prompt.index not in replies or turn >= len(prompt.conversation.turns):
                    continue
                try:
                    asked.append((prompt, self._tokens(prompt.conversation, turn, replies[prompt.index])))
                except UsageError as error:
                    del replies[prompt.index]
                    refuse(prompt, str(error))
            for prompt, reply in self._reply(asked, turn):
                replies[prompt.index].append(reply)
        return [(prompt, replies[prompt.index]) for prompt in batch if prompt.index in replies]

    def _tokens(self, conversation: Conversation, turn: int, replies: list[Reply]) -> list[int]:
        said = [reply.text for reply in replies]
        tokens = conversation.prompt(turn, said, self.template)
        if len(tokens) >= self._context:
            raise UsageError(
                f"{conversation.location}: turn {turn + 1} has {len(tokens):,} tokens, and the verifier's context "
                f"takes {self._context:,}"
            )
        return tokens

    def _reply(self, asked: list[tuple[Prompt, list[int]]], turn: int) -> Iterator[tuple[Prompt, Reply]]:
        said: list[list[int]] = [[] for _ in asked]
        seeds = [self.generation.seed_of(prompt.index, turn) for prompt, _ in asked]
        for emission in self.decoder.decode(
            [torch.tensor(tokens) for _, tokens in asked], self.generation.max_new_tokens, seeds
        ):
            said[emission.sequence] += emission.tokens
        for (prompt, tokens), produced in zip(asked, said, strict=True):
            finish = "stop" if produced[-1] in self.decoder.stop_tokens else "length"
            text = reply_text(produced, self.template.tokenizer)
            yield prompt, Reply(text, finish, len(produced), tokens, produced)
