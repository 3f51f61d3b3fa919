"""A serving engine that answers: any endpoint that speaks OpenAI's chat completions, through the openai client.

What the client does by itself is left to it: retries with backoff, connections that are kept. Below it, each answer has
one deadline and is checked, so that one that drips or has a wrong shape is tried again as one that was lost.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import openai
from openai import AsyncOpenAI

from specforge.engines.asking import Asking, Reply
from specforge.engines.completion import Completion, read_completion
from specforge.engines.connection import Address, Connection, Models, WrongAnswer, on_one_line
from specforge.errors import SpecforgeError, UsageError

_log = logging.getLogger(__name__)
API_KEY = "OPENAI_API_KEY"


class Unanswered(Exception):
    """A request has failed, but might not the next time: no connection, no answer in time, a fault of the server."""


class Refused(Exception):
    """The engine refuses this one request, and would again."""


@dataclass
class Engine:
    """One endpoint.

    Attributes:
        url: Its base, such as ``http://localhost:8000/v1``, without a password.
        client: Speaks to it.
        takes_extensions: Whether it takes what goes beyond OpenAI's fields, as ``probe`` finds out.
        in_flight: Requests that wait for it.
        failures: Requests in a row that have failed.
    """

    url: str
    client: AsyncOpenAI = field(repr=False)
    takes_extensions: bool = True
    in_flight: int = 0
    failures: int = 0

    @classmethod
    def at(cls, url: str, retries: int, timeout: float, vocabulary: int | None = None) -> Engine:
        """Return the engine at a URL.

        Args:
            url: Base of its paths; a name and password in it are sent, and not shown.
            retries: How often the client tries a request again.
            timeout: Seconds that an answer may take, from the request to its last byte.
            vocabulary: Number of the verifier's tokens; None if it is not known.

        Raises:
            UsageError: It is no address of a server, or the API key cannot be sent.
        """
        # An engine of one's own mostly asks for no key, but the client does.
        key = os.environ.get(API_KEY, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise UsageError(f"{API_KEY} holds characters that a header cannot; set it to the engine's key")
        address = Address.of(url)
        connection = Connection(address, timeout, partial(_check, vocabulary))
        client = AsyncOpenAI(base_url=address.url, api_key=key, max_retries=retries, http_client=connection)
        return cls(address.url, client)

    async def models(self) -> list[str]:
        """Return the names of the models that it serves.

        Raises:
            SpecforgeError: It cannot be reached, or does not tell.
        """
        try:
            listed = await self.client.models.with_raw_response.list()
            return [model.id for model in Models.model_validate_json(listed.content).data]
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self.url}: {_explained(error)}") from error

    async def probe(self, model: str, asking: Asking) -> None:
        """Ask for one token, to learn at once whether requests will do at all, and which fields the engine takes.

        Raises:
            SpecforgeError: They will not do.
        """
        few = Asking(asking.sampling, 1, asking.seed, asking.template_arguments)
        hello = [{"role": "user", "content": "Hello"}]
        try:
            await self._complete(model, hello, few, asking.seed_of(0, 0))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if asking.sampling.top_k:
                raise SpecforgeError(f"{self.url}: {_explained(error)}; --top_k needs one that takes it") from error
            self.takes_extensions = False
            try:
                await self._complete(model, hello, few, asking.seed_of(0, 0))
            except openai.OpenAIError as plain:
                raise SpecforgeError(f"{self.url}: {_explained(plain)}") from plain
            _log.warning(
                "%s takes no fields beyond OpenAI's own (%s): its own defaults of top_k, min_p and "
                "repetition_penalty hold, and it returns no token ids",
                self.url,
                _reason(error),
            )
        except openai.OpenAIError as error:
            raise SpecforgeError(f"{self.url}: {_explained(error)}") from error

    async def reply(
        self, model: str, chat: list[Any], asking: Asking, seed: int, tools: list[Any] | None = None
    ) -> Reply:
        """Ask for one reply.

        Args:
            model: The engine's name for the verifier.
            chat: Messages that the reply follows.
            asking: How it is asked.
            seed: Of the reply.
            tools: Descriptions of tools, if the chat has any.

        Raises:
            Unanswered: There is none this time.
            Refused: The engine refuses the request.
            SpecforgeError: It would refuse every request: a wrong key, model or path.
        """
        self.in_flight += 1
        try:
            completion = await self._complete(model, chat, asking, seed, tools)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise SpecforgeError(f"{self.url}: {_explained(error)}") from error
        except (openai.RateLimitError, openai.ConflictError, openai.InternalServerError) as error:
            raise Unanswered(_explained(error)) from error
        except openai.APIStatusError as error:
            if error.status_code == 408:
                raise Unanswered(_explained(error)) from error
            raise Refused(_reason(error)) from error
        except openai.OpenAIError as error:
            raise Unanswered(_explained(error)) from error
        finally:
            self.in_flight -= 1
        return _read(completion)

    async def _complete(
        self, model: str, chat: list[Any], asking: Asking, seed: int, tools: list[Any] | None = None
    ) -> Completion:
        sampling = asking.sampling
        extra: dict[str, Any] = {}
        if self.takes_extensions:
            # Engines fall back on the model's generation_config.json for what is left out; -1 stands for all tokens.
            extra = {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        if asking.template_arguments:
            extra["chat_template_kwargs"] = asking.template_arguments
        answer = await self.client.chat.completions.with_raw_response.create(
            model=model,
            messages=chat,
            tools=tools or openai.omit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=asking.max_new_tokens,
            seed=seed,
            extra_body=extra,
        )
        return read_completion(answer.content)


def _check(vocabulary: int | None, path: str, body: bytes) -> object:
    """Refuse an answer of the wrong shape, by what was asked."""
    return read_completion(body, vocabulary) if path.endswith("/chat/completions") else Models.model_validate_json(body)


def _read(completion: Completion) -> Reply:
    """Read an answer, with the token ids where the engine adds them (vLLM does).

    Raises:
        Refused: There is only a part of the reply in it.
    """
    choice, message = completion.choices[0], completion.choices[0].message
    token_ids, prompt_ids = choice.token_ids, completion.prompt_token_ids
    if token_ids is None or prompt_ids is None:
        token_ids = prompt_ids = None
        if message.tool_calls or message.reasoning_content or message.reasoning:
            raise Refused(
                "the engine takes thinking or tool calls out of the text and returns no token ids, so that what the "
                "verifier wrote is not known; start it without a parser of reasoning and tool calls"
            )
    counted = completion.usage.completion_tokens if completion.usage else None
    tokens = len(token_ids) if token_ids is not None else counted or 0
    return Reply(message.content or "", choice.finish_reason, tokens, prompt_ids, token_ids)


def _explained(error: Exception) -> str:
    """Say what a failed request means, and what to do about it."""
    reason = _reason(error)
    match error:
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return f"the engine refuses the API key ({reason}); put the right one into {API_KEY}"
        case openai.NotFoundError():
            return f"not found ({reason}); check --model, and that the URL ends where /chat/completions goes on (/v1)"
        case openai.APITimeoutError():
            return "no answer in time; raise --timeout, or lower --concurrency"
        case openai.APIConnectionError(__cause__=WrongAnswer() as wrong):
            return f"the answer is not one of chat completions ({wrong}); is the URL that of an engine?"
        case openai.APIConnectionError():
            return f"no connection ({on_one_line(repr(error.__cause__))}); is the engine running?"
        case openai.APIStatusError():
            return f"status {error.status_code} ({reason})"
    return reason


def _reason(error: Exception) -> str:
    """Return the engine's own words, in one line that is not too long."""
    body = getattr(error, "body", None)
    said = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return on_one_line(said or error)
