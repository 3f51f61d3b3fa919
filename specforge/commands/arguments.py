"""Common parts of commands: parsing, the flags of commands that decode, and loading of the named models."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from pydantic import BaseModel, ValidationError

from specforge.bounds import VerifierType
from specforge.commands.wrapping import HelpFormatter, wrap_hanging
from specforge.config import SpeculatorModelConfig
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.settings import Verification
from specforge.errors import UsageError, describe_invalid
from specforge.private.argparse import action_of
from specforge.sampling import Sampling
from specforge.training.cli.config_errors import explain
from specforge.training.cli.numbers import accept_in_files, whole_numbers

# torch takes seconds to import, so it waits until the arguments are known to be right.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specforge.data.text.template import ChatTemplate
    from specforge.models.speculator import SpeculatorModel
    from specforge.verifier.loading import VerifierLoading

PROPOSAL = "NAME or NAME:KEY=VALUE,...; names: specforge plugins."


def command_parser(command: str, usage: str, description: str) -> ArgumentParser:
    """Return a parser that can also read its flags from a file; the command adds the flags.

    Args:
        command: Name of the subcommand.
        usage: Its required arguments, for the usage line.
        description: Description for ``--help``.
    """
    accept_in_files()
    parser = ArgumentParser(
        prog=f"specforge {command}",
        usage=wrap_hanging(f"specforge {command} ", f"{usage} [options]", label="usage: "),
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="A YAML file with flags as keys; flags override it."
    )
    printing = action_of(parser, "--print_config")
    assert printing is not None
    printing.help = "Print all settings as such a file, and exit."
    return parser


def add_verifier_flags(parser: ArgumentParser, verifier: str) -> None:
    """Add the flags for the verifier and how it is loaded.

    Args:
        parser: The command's parser.
        verifier: Help text of ``--verifier``.
    """
    parser.add_argument("--verifier", type=str | None, default=None, metavar="MODEL", help=verifier)
    parser.add_argument(
        "--verifier_dtype",
        type=VerifierType,
        default="auto",
        help="Dtype of its weights; auto: as stored, but float32 without an accelerator or AMX.",
    )
    parser.add_argument(
        "--verifier_revision", type=str | None, default=None, metavar="NAME", help="Its branch, tag or commit."
    )
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="Run code from its repository.")
    add_template_flags(parser)


def add_template_flags(parser: ArgumentParser) -> None:
    """Add the flags for further inputs of the verifier's chat template."""
    parser.add_argument(
        "--template_arguments",
        type=dict[str, Any] | None,
        default=None,
        metavar="OBJECT",
        help="Arguments of the chat template, such as --template_arguments.enable_thinking false.",
    )
    parser.add_argument(
        "--template_date",
        type=str | None,
        default=None,
        metavar="DAY",
        help="Date that a chat template prints as today, such as 2026-11-29.",
    )


def verifier_text(found: Namespace, name: str) -> VerifierTokenizer:
    """Return a verifier's tokenizer, with the chat template as set by the flags."""
    return VerifierTokenizer(
        name, found.verifier_revision, found.trust_remote_code, found.template_arguments, found.template_date
    )


def template_words(found: Namespace, prefix: str = "") -> list[str]:
    """Return the flags with which another command renders chats in the same way."""
    words = []
    for key, value in (found.template_arguments or {}).items():
        words += [f"--{prefix}template_arguments.{key}", json.dumps(value)]
    return [*words, f"--{prefix}template_date", found.template_date] if found.template_date else words


def answering_parser(command: str, usage: str, description: str, max_new_tokens: int, verifier: str) -> ArgumentParser:
    """Return a parser with the flags of a verifier that answers; the command adds its own.

    Args:
        command: Name of the subcommand.
        usage: Its required arguments, for the usage line.
        description: Description for ``--help``.
        max_new_tokens: Default of ``--max_new_tokens``.
        verifier: Help text of ``--verifier``.
    """
    parser = command_parser(command, usage, description)
    add_verifier_flags(parser, verifier)
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=_described(Sampling, "temperature"))
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help=_described(Sampling, "top_k"))
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help=_described(Sampling, "top_p"))
    parser.add_argument(
        "--max_new_tokens", type=PositiveInt, default=max_new_tokens, metavar="N", help="Maximum length of a response."
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, metavar="N", help="Seed of all randomness.")
    return parser


def decoding_parser(command: str, usage: str, description: str, max_new_tokens: int) -> ArgumentParser:
    """Return a parser with the flags of decoding; the command adds its own.

    Args:
        command: Name of the subcommand.
        usage: Its required arguments, for the usage line.
        description: Description for ``--help``.
        max_new_tokens: Default of ``--max_new_tokens``.
    """
    verifier = "Folder or hub id; by default the draft's own."
    parser = answering_parser(command, usage, description, max_new_tokens, verifier)
    methods = Verification.model_fields["method"].annotation
    parser.add_argument(
        "--verification", type=methods, default=get_args(methods)[0], help=_described(Verification, "method")
    )
    return parser


def loading_of(found: Namespace) -> VerifierLoading:
    """Return how to load the verifier."""
    from specforge.verifier.loading import VerifierLoading

    return VerifierLoading(found.verifier_dtype, found.verifier_revision, found.trust_remote_code)


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse a command's arguments; flags may be written with hyphens or underscores.

    Raises:
        UsageError: They are invalid.
    """
    words = [re.sub(r"^--[\w-]+", _underscored, word) for word in arguments]
    try:
        return parser.parse_args(whole_numbers(parser, words))
    except argparse.ArgumentError as error:
        raise UsageError(explain(str(error), parser, words)) from None


def sampling_of(found: Namespace) -> Sampling:
    """Return the sampling settings.

    Raises:
        UsageError: A value is out of bounds.
    """
    try:
        return Sampling(temperature=found.temperature, top_k=found.top_k, top_p=found.top_p)
    except ValidationError as error:
        raise UsageError(describe_invalid(error)) from None


def find_verifier(found: Namespace, drafts: list[SpeculatorModelConfig]) -> str:
    """Return the verifier given by the flag, or else the one that the drafts name.

    Raises:
        UsageError: There is none, or the drafts name several.
    """
    if found.verifier:
        return str(found.verifier)
    named = {one.speculators_config.verifier.name_or_path for one in drafts if one.speculators_config is not None}
    named.discard(None)
    if len(named) != 1:
        several = f"the drafts name several verifiers: {', '.join(sorted(map(str, named)))}"
        raise UsageError(f"{several if named else 'no verifier is named'}; give --verifier FOLDER_OR_HUB_ID")
    return str(named.pop())


def load(found: Namespace, name: str) -> tuple[PreTrainedModel, ChatTemplate]:
    """Load a verifier onto the accelerator, if there is one, and its chat template with the tokenizer.

    Raises:
        UsageError: One of them cannot be loaded.
    """
    from specforge.verifier.loading import running_verifier

    verifier = running_verifier(name, loading_of(found))
    return verifier, verifier_text(found, name).template


def load_draft(name: str, verifier: PreTrainedModel) -> SpeculatorModel:
    """Load a draft onto its verifier's device, in the verifier's dtype.

    Raises:
        UsageError: It cannot be loaded.
    """
    from specforge.models.speculator import SpeculatorModel

    draft = SpeculatorModel.from_pretrained(name, verifier=verifier, dtype=verifier.dtype)
    return draft.to(verifier.device).eval()


def _underscored(match: re.Match[str]) -> str:
    return "--" + match[0].removeprefix("--").replace("-", "_")


def _described(settings: type[BaseModel], name: str) -> str:
    return str(settings.model_fields[name].description)
