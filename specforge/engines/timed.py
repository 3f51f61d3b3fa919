"""Timed requests: each response is streamed, so that the times of its first and last token are known.

A request is sent once: a retry would falsify its times.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Self

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import ValidationError

from specforge.engines.client import api_key, explained, neutral_fields
from specforge.engines.completion import StreamedPart
from specforge.engines.connection import Address, RequestError, certificates, on_one_line
from specforge.engines.generation import GenerationSettings
from specforge.errors import SpecforgeError, UsageError, describe_invalid

DATA = "data:"  # lines of a server-sent event
END = "[DONE]"


@dataclass(frozen=True)
class TimedReply:
    """One reply with its times, in seconds of ``time.perf_counter``.

    Attributes:
        text: The reply, without its thinking.
        tokens: Number of generated tokens.
        sent: When the request was sent.
        first: When the first part of the reply came.
        last: When the last part came.
    """

    text: str
    tokens: int
    sent: float
    first: float
    last: float

    @property
    def decoding(self) -> float:
        """Seconds from the first part to the last."""
        return self.last - self.first


class TimedEngine:
    """One endpoint whose responses are timed.

    Args:
        address: Its address.
        timeout: Seconds allowed for a response.
        flag: Flag that named it, for errors.
    """

    def __init__(self, address: Address, timeout: float, flag: str) -> None:
        self.address = address
        self.flag = flag
        self.model = ""
        self._timeout = timeout
        self._takes_extensions = True
        http = DefaultAsyncHttpxClient(auth=address.credentials, timeout=timeout, verify=certificates())
        self._client = AsyncOpenAI(
            base_url=f"{address.root.url}/v1", api_key=api_key(), max_retries=0, http_client=http
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def choose_model(self, wanted: str | None) -> None:
        """Find the model to ask for: the wanted one, or the only one that is served.

        Raises:
            UsageError: The engine does not serve the wanted model, or several models and none is wanted.
            SpecforgeError: The engine cannot be reached.
        """
        try:
            served = [model.id async for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self._named}: {explained(error)}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise SpecforgeError(f"{self._named} lists no models; is this the URL of an engine?") from error
        shown = ", ".join(map(on_one_line, served)) or "no model"
        if wanted is not None and wanted not in served:
            raise UsageError(f"--model: {self._named} does not serve {wanted!r}; it serves {shown}")
        if wanted is None and len(served) != 1:
            raise UsageError(f"--model: choose one, {self._named} serves {shown}")
        self.model = served[0] if wanted is None else wanted

    async def warm_up(self, prompt: list[Any], generation: GenerationSettings) -> None:
        """Request a short reply, and find out whether the engine accepts fields beyond OpenAI's.

        Raises:
            SpecforgeError: Requests do not work.
        """
        try:
            await self._stream(prompt, generation, 0, "warm-up")
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            self._takes_extensions = False
            await self.reply(prompt, generation, 0, "warm-up")
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self._named}: {explained(error)}") from error

    async def reply(self, prompt: list[Any], generation: GenerationSettings, seed: int, salt: str) -> TimedReply:
        """Request one reply.

        Args:
            prompt: Messages of a chat, or token ids.
            generation: Settings of the generation.
            seed: Seed of the reply.
            salt: Only requests with the same salt share cached prefixes, in engines that know the field.

        Raises:
            SpecforgeError: The request failed, or the stream is malformed or counts no tokens.
        """
        try:
            return await self._stream(prompt, generation, seed, salt)
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self._named}: {explained(error)}") from error

    @property
    def _named(self) -> str:
        return f"{self.flag} {self.address.url}"

    async def _stream(self, prompt: list[Any], generation: GenerationSettings, seed: int, salt: str) -> TimedReply:
        texts: list[str] = []
        tokens, first = 0, None
        sent = last = perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                async for part in self._parts(prompt, generation, seed, salt):
                    if part.choices:
                        last = perf_counter()
                        texts.append(part.text)
                    if part.has_output and first is None:
                        first = last
                    if part.usage is not None:
                        tokens = part.usage.completion_tokens or 0
        except TimeoutError:
            raise SpecforgeError(
                f"{self._named}: no complete response in {self._timeout:g} s; raise --timeout or lower --concurrency"
            ) from None
        except RequestError as error:
            raise SpecforgeError(f"{self._named} broke off a response: {on_one_line(repr(error))}") from error
        if not tokens:
            raise SpecforgeError(
                f"{self._named} does not count the tokens of a streamed response (stream_options.include_usage)"
            )
        # The reply of an end token only has no text.
        return TimedReply("".join(texts), tokens, sent, last if first is None else first, last)

    async def _parts(
        self, prompt: list[Any], generation: GenerationSettings, seed: int, salt: str
    ) -> AsyncIterator[StreamedPart]:
        sampling, is_chat = generation.sampling, not isinstance(prompt[0], int)
        extra: dict[str, Any] = {**neutral_fields(sampling), "cache_salt": salt} if self._takes_extensions else {}
        if generation.template_arguments and is_chat:
            extra["chat_template_kwargs"] = generation.template_arguments
        settings: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": generation.max_new_tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": extra,
        }
        requests = (
            self._client.chat.completions.with_streaming_response.create(messages=prompt, **settings)
            if is_chat
            else self._client.completions.with_streaming_response.create(prompt=prompt, **settings)
        )
        async with requests as response:
            async for line in response.iter_lines():
                event = line.removeprefix(DATA).strip()
                if event == END:
                    return
                if line.startswith(DATA):
                    yield self._read(event)
        raise SpecforgeError(f"{self._named} ended a stream before its last event; is this the URL of an engine?")

    def _read(self, event: str) -> StreamedPart:
        try:
            part = StreamedPart.model_validate_json(event)
        except ValidationError as error:
            reason = on_one_line(describe_invalid(error))
            raise SpecforgeError(f"{self._named}: a part of a response is malformed: {reason}") from None
        if part.error is not None:
            raise SpecforgeError(f"{self._named} broke off a response: {on_one_line(part.error)}")
        return part
