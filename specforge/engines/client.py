"""Client of a serving engine: any endpoint with OpenAI's completions, through the openai client.

The openai client handles retries with backoff and connection reuse. The HTTP layer below it enforces one deadline per
response and checks its form, so that slow or malformed responses are retried like lost ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import openai
from openai import AsyncOpenAI

from specforge.engines.completion import Completion, Extraction, read_completion
from specforge.engines.connection import Address, Connection, Models, WrongAnswer, on_one_line
from specforge.engines.generation import GenerationSettings, Reply
from specforge.errors import SpecforgeError, UsageError
from specforge.sampling import Sampling

_log = logging.getLogger(__name__)
API_KEY = "OPENAI_API_KEY"
# vLLM takes the id of a request from this header, and names its files after it.
REQUEST_ID = "X-Request-Id"
_START_IT = "start it with the command line that specforge serve-verifier --print prints"


class Unanswered(Exception):
    """A request failed but may succeed later: no connection, no response in time, a server error."""


class Unreachable(Unanswered):
    """There is no connection to the engine: it is not running, or has ended."""


class Refused(Exception):
    """The engine refuses this request and would refuse it again."""


def request_id(tag: str) -> str:
    """Return a new id of a request that begins with a tag."""
    return f"{tag}-{uuid4().hex[:12]}"


@dataclass
class Engine:
    """One endpoint.

    Attributes:
        url: Base URL without credentials, such as ``http://localhost:8000/v1``.
        client: The openai client.
        takes_extensions: Whether it accepts fields beyond OpenAI's; determined by ``probe``.
        in_flight: Number of pending requests.
        failures: Number of consecutive failed requests.
        rests_until: Time (``time.monotonic``) until which it gets no requests.
        last_asked: Time of its last request.
    """

    url: str
    client: AsyncOpenAI = field(repr=False)
    takes_extensions: bool = True
    in_flight: int = 0
    failures: int = 0
    rests_until: float = 0.0
    last_asked: float = 0.0

    @classmethod
    def at(cls, url: str, retries: int, timeout: float, vocabulary: int | None = None) -> Engine:
        """Return the engine at a URL.

        Args:
            url: Base URL; credentials in it are sent but not shown.
            retries: Number of retries of a request.
            timeout: Seconds allowed from the request to the last byte of the response.
            vocabulary: Vocabulary size V of the verifier; None if unknown.

        Raises:
            UsageError: It is not the URL of a server, or the API key cannot be sent.
        """
        key, address = api_key(), Address.of(url)
        connection = Connection(address, timeout, partial(_check, vocabulary))
        client = AsyncOpenAI(base_url=address.url, api_key=key, max_retries=retries, http_client=connection)
        return cls(address.url, client)

    async def models(self) -> list[str]:
        """Return the names of the served models.

        Raises:
            SpecforgeError: The engine cannot be reached or does not list its models.
        """
        try:
            listed = await self.client.models.with_raw_response.list()
            return [model.id for model in Models.model_validate_json(listed.content).data]
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self.url}: {explained(error)}") from error

    async def probe(self, model: str, generation: GenerationSettings, keep_states: str | None = None) -> None:
        """Request one token to check early that requests work, and which fields the engine accepts.

        Args:
            model: The engine's name for the verifier.
            generation: Settings of the generation.
            keep_states: See ``reply``.

        Raises:
            SpecforgeError: Requests do not work.
        """
        one_token = GenerationSettings(generation.sampling, 1, generation.seed, generation.template_arguments)
        hello = [{"role": "user", "content": "Hello"}]
        try:
            await self._complete(model, hello, one_token, generation.seed_of(0, 0), keep_states=keep_states)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if generation.sampling.top_k:
                raise SpecforgeError(
                    f"{self.url}: {explained(error)}; --top_k needs an engine that accepts it"
                ) from error
            self.takes_extensions = False
            try:
                await self._complete(model, hello, one_token, generation.seed_of(0, 0))
            except openai.OpenAIError as plain:
                raise SpecforgeError(f"{self.url}: {explained(plain)}") from plain
            _log.warning(
                "%s accepts only OpenAI's own fields (%s): its defaults of top_k, min_p and repetition_penalty "
                "apply, and it returns no token ids",
                self.url,
                _reason(error),
            )
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self.url}: {explained(error)}") from error

    async def reply(
        self,
        model: str,
        chat: list[Any],
        generation: GenerationSettings,
        seed: int,
        tools: list[Any] | None = None,
        keep_states: str | None = None,
    ) -> Reply:
        """Request one reply.

        Args:
            model: The engine's name for the verifier.
            chat: Messages before the reply.
            generation: Settings of the generation.
            seed: Seed of the reply.
            tools: Tool descriptions, if the chat has any.
            keep_states: Id of the request, for the names of the files in which the engine keeps the states of prompt
                and reply; None keeps none.

        Raises:
            Unanswered: The request failed but may succeed later.
            Refused: The engine refuses the request.
            SpecforgeError: The engine would refuse every request: a wrong key, model or path; or it keeps no states.
        """
        with self._requesting():
            reply = _read(await self._complete(model, chat, generation, seed, tools, keep_states))
        if keep_states is not None and (reply.states is None or reply.token_ids is None):
            missing = "extract states" if reply.states is None else "return token ids"
            raise SpecforgeError(f"{self.url} answers, but does not {missing}; {_START_IT}")
        return reply

    async def extract(self, model: str, tokens: list[int], request: str) -> dict[str, Any]:
        """Let the engine process some tokens, and return where it writes its states of them.

        Args:
            model: The engine's name for the verifier.
            tokens: Token ids.
            request: Id of the request, which becomes a part of the names of its files.

        Returns:
            The ``kv_transfer_params`` of the response.

        Raises:
            Unanswered: The request failed but may succeed later.
            Refused: The engine refuses the request.
            SpecforgeError: The engine would refuse every request, or extracts no states.
        """
        with self._requesting():
            answer = await self.client.completions.with_raw_response.create(
                model=model,
                prompt=tokens,
                max_tokens=1,
                temperature=0.0,
                extra_headers={REQUEST_ID: request},
            )
        found = Extraction.model_validate_json(answer.content).kv_transfer_params
        if found is None:
            raise SpecforgeError(f"{self.url} answers, but does not extract states; {_START_IT}")
        return found

    @contextmanager
    def _requesting(self) -> Iterator[None]:
        """Count a request as in flight, and translate its errors."""
        self.in_flight += 1
        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise SpecforgeError(f"{self.url}: {explained(error)}") from error
        except (openai.RateLimitError, openai.ConflictError, openai.InternalServerError) as error:
            raise Unanswered(explained(error)) from error
        except openai.APIStatusError as error:
            if error.status_code == 408:
                raise Unanswered(explained(error)) from error
            raise Refused(_reason(error)) from error
        except openai.APIConnectionError as error:
            came = isinstance(error, openai.APITimeoutError) or isinstance(error.__cause__, WrongAnswer)
            raise (Unanswered if came else Unreachable)(explained(error)) from error
        except openai.OpenAIError as error:
            raise Unanswered(explained(error)) from error
        finally:
            self.in_flight -= 1

    async def _complete(
        self,
        model: str,
        chat: list[Any],
        generation: GenerationSettings,
        seed: int,
        tools: list[Any] | None = None,
        keep_states: str | None = None,
    ) -> Completion:
        sampling = generation.sampling
        extra: dict[str, Any] = {}
        if self.takes_extensions:
            extra = {**neutral_fields(sampling), "return_token_ids": True}
        if generation.template_arguments:
            extra["chat_template_kwargs"] = generation.template_arguments
        if keep_states is not None:
            extra["kv_transfer_params"] = {"include_output_tokens": True}
        answer = await self.client.chat.completions.with_raw_response.create(
            model=model,
            messages=chat,
            tools=tools or openai.omit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=generation.max_new_tokens,
            seed=seed,
            extra_body=extra,
            extra_headers={} if keep_states is None else {REQUEST_ID: keep_states},
        )
        return read_completion(answer.content)


def api_key() -> str:
    """Return the key that the environment sets; a local engine usually needs none, but the client requires one.

    Raises:
        UsageError: It cannot be sent.
    """
    key = os.environ.get(API_KEY, "").strip() or "none"
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{API_KEY} holds characters that a header cannot carry; set it to the engine's key")
    return key


def neutral_fields(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling fields beyond OpenAI's; if omitted, engines use the model's ``generation_config.json``."""
    return {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}  # -1 means all tokens


def _check(vocabulary: int | None, path: str, body: bytes) -> object:
    """Raise ``ValueError`` if a response does not have the form that its path requires."""
    if path.endswith("/chat/completions"):
        return read_completion(body, vocabulary)
    return (Extraction if path.endswith("/completions") else Models).model_validate_json(body)


def _read(completion: Completion) -> Reply:
    """Read a response, with token ids if the engine returns them (vLLM does).

    Raises:
        Refused: The text is only a part of the reply.
    """
    choice, message = completion.choices[0], completion.choices[0].message
    token_ids, prompt_ids = choice.token_ids, completion.prompt_token_ids
    if token_ids is None or prompt_ids is None:
        token_ids = prompt_ids = None
        if message.tool_calls or message.reasoning_content or message.reasoning:
            raise Refused(
                "the engine removes thinking or tool calls from the text and returns no token ids, so the verifier's "
                "exact output is unknown; start it without reasoning and tool call parsers"
            )
    counted = completion.usage.completion_tokens if completion.usage else None
    tokens = len(token_ids) if token_ids is not None else counted or 0
    states = completion.kv_transfer_params
    return Reply(message.content or "", choice.finish_reason, tokens, prompt_ids, token_ids, states)


def explained(error: Exception) -> str:
    """Return what a failed request means and what to do about it."""
    reason = _reason(error)
    match error:
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return f"the engine refuses the API key ({reason}); set the right one in {API_KEY}"
        case openai.NotFoundError():
            return (
                f"not found ({reason}); check --model, and that the URL is the part before /chat/completions (.../v1)"
            )
        case openai.APITimeoutError():
            return "no response in time; raise --timeout or lower --concurrency"
        case openai.APIConnectionError(__cause__=WrongAnswer() as wrong):
            what = "chat completion" if wrong.request.url.path.endswith("/chat/completions") else "completion"
            return f"the response is not a {what} ({wrong}); is this the URL of an engine?"
        case openai.APIConnectionError():
            return f"no connection ({on_one_line(repr(error.__cause__))}); is the engine running?"
        case openai.APIStatusError():
            return f"status {error.status_code} ({reason})"
    return reason


def _reason(error: Exception) -> str:
    """Return the engine's own error message as one short line."""
    body = getattr(error, "body", None)
    message = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    if isinstance(message, str) and message.lstrip().startswith("<"):
        return "the answer is a web page"
    return on_one_line(message or error)
