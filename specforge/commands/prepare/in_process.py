"""Answers by a verifier in this process, batch by batch."""

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


class InProcessAnswerer:
    """Answers conversations with a loaded verifier.

    Args:
        verifier: The verifier.
        template: Its chat template, with the tokenizer.
        generation: Generation settings.
        batch_size: Number of conversations in a batch.
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

        Batches depend only on the conversations' indices, so a resumed run forms the same batches and gets bit-equal
        results; ``keep`` gets whole batches.

        Args:
            prompts: The conversations, in order.
            keep: Called with finished conversations.
            refuse: Called with conversations that leave no room in the verifier's context, or that the chat template
                rejects.
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
        tokens = conversation.prompt(turn, [reply.text for reply in replies], self.template)
        if len(tokens) >= self._context:
            raise UsageError(
                f"{conversation.location}: turn {turn + 1} has {len(tokens):,} tokens, and the verifier's context "
                f"is {self._context:,}"
            )
        return tokens

    def _reply(self, asked: list[tuple[Prompt, list[int]]], turn: int) -> Iterator[tuple[Prompt, Reply]]:
        responses: list[list[int]] = [[] for _ in asked]
        seeds = [self.generation.seed_of(prompt.index, turn) for prompt, _ in asked]
        for emission in self.decoder.decode(
            [torch.tensor(tokens) for _, tokens in asked], self.generation.max_new_tokens, seeds
        ):
            responses[emission.sequence] += emission.tokens
        for (prompt, tokens), response in zip(asked, responses, strict=True):
            finish = "stop" if response[-1] in self.decoder.stop_tokens else "length"
            text = reply_text(response, self.template.tokenizer)
            yield prompt, Reply(text, finish, len(response), tokens, response)
