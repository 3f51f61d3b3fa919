"""Turns the parser's errors into one message: the key, its line, the allowed values, the closest valid name."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from pydantic import ValidationError

from specforge.errors import UsageError, nearest_name
from specforge.private.argparse import actions, type_of
from specforge.training.cli.config_files import config_files, read_yaml
from specforge.training.cli.precision import check_precision
from specforge.training.cli.trainer_values import check_trainer

# Keys of the whole run that module and data both get from the top level.
SHARED = ("verifier", "verifier_dtype", "verifier_revision", "trust_remote_code", "verifier_sharding")
# The key of a callback that is set from the top level, as in files and as flags.
EVERY = "callbacks.last_checkpoint.init_args.every_n_steps"
EVERY_FLAGS = (f"--{EVERY}", f"--{EVERY.replace('.init_args', '')}")
# Names that other trainers give to settings, with ours.
OTHER_NAMES = {
    "bf16": "precision",
    "device": "accelerator",
    "fp16": "precision",
    "gpus": "devices",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "learning_rate": "lr",
    "max_seq_length": "max_length",
    "model_name_or_path": "verifier",
    "per_device_train_batch_size": "batch_size",
    "report_to": "logger",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "seed": "seed_everything",
    "tensorboard": "logger",
    "wandb": "logger",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
}
MISSING = object()
KEYS_AND_VALUES = "keys and values"
MOST_SUGGESTED = 3

# What pydantic adds around the actual message.
NOISE = (
    r"^Value error, ",
    r"\d+ validation errors? for .*",
    r"For further information visit \S+",
    r"\[type=[^\]]*\]",
)


def explain(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """Rewrite an error of the parser for the author of the configuration.

    Args:
        message: The parser's message.
        parser: The parser, which has all valid names.
        arguments: The words of the command line.
    """
    unknown = _unknown_key(message)
    if unknown is not None:
        return f"unknown key {unknown!r}{_where_set(unknown, arguments)}.{_nearest(unknown, known_keys(parser))}"
    match = re.match(r'Parser key "(?P<key>[^"]+)"(?: element \d+)?:\s*(?P<reason>.*)', message, re.DOTALL)
    if match:
        reason = _with_example(_reason(match["reason"]), _default_of(match["key"], parser))
        if reason.endswith("got 'None'"):
            default = _default_of(match["key"], parser)
            if default is not None:
                return f"{match['key']}: {_no_null(default)}{_where_set(match['key'], arguments)}"
            reason = f"is required; give it in the configuration file or as --{match['key']}"
        return f"{match['key']}: {reason}{_where_set(match['key'], arguments)}"
    if match := re.match(r"argument (?P<flag>\S+): expected (at least )?one argument", message):
        return f"{match['flag']} needs a value"
    if match := re.match(r"the following arguments are required: (?P<names>.*)", message):
        names = (_as_typed(name, parser) for name in match["names"].split(", "))
        return f"required: {', '.join(names)}{_see(parser)}"
    if match := re.match(r"argument \S+: invalid choice: '(?P<given>.*)' \(choose from (?P<allowed>.*)\)", message):
        allowed = match["allowed"].replace("'", "").split(", ")
        return f"there is no {match['given']!r}; known: {', '.join(allowed)}.{nearest_name(match['given'], allowed)}"
    if match := re.match(r"unrecognized arguments: (?P<words>[^-].*)", message, re.IGNORECASE):
        return f"unexpected argument {match['words']!r}; use --KEY VALUE{_see(parser)}"
    return " ".join(message.split())


def explain_settings(error: ValidationError, parser: ArgumentParser, arguments: list[str]) -> str:
    """Name the keys of settings whose values are invalid or conflict."""
    groups = (one.dest for one in _groups(parser) if getattr(one, "basetype", type(None)).__name__ == error.title)
    group = next(groups, error.title)
    lines = []
    for fault in error.errors():
        key = ".".join([group, *(str(part) for part in fault["loc"])])
        value = f", got {fault['input']!r}" if fault["loc"] else ""
        lines.append(f"{key}: {_reason(fault['msg'])}{value}{_where_set(key, arguments)}")
    return "; ".join(lines)


def explain_class(message: str) -> str | None:
    """Return why an object of a configured class, such as a logger, cannot be created; None for other errors.

    Args:
        message: The parser's message.
    """
    if argument := re.search(
        r"Problem with given class_path '(?:[\w.]*\.)?(\w+)':\s*Parser key \"(\w+)\":\s*([^\n]+)", message
    ):
        return f"{argument[1]}: {argument[2]}: {_reason(argument[3])}"
    if problem := re.search(r"Problem with given class_path '([^']+)':\s*([^\n]+)", message):
        reason = problem[2].strip()
        if reason.startswith("No module named"):
            return f"{problem[1]}: {reason}; install the package that it is part of"
        return f"{problem[1].rpartition('.')[2]}: {reason}"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"there is no class {unknown[1]!r} here{_nearest_class(unknown[1])}"
    if other := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        return f"{other[1]} is not a subclass of {other[2]}"
    name = re.search(r"class_path='(?:[\w.]*\.)?(\w+)'", message)
    fault = re.search(
        r"Errors:\s*- (?:Problem with given class_path '[^']*':\s*)?(?!Expected )(.*?)\s*(?:\n\s*- |\nGiven value)",
        message,
        re.DOTALL,
    )
    return f"{name[1]}: {' '.join(fault[1].split())}" if name and fault else None


def _nearest_class(name: str) -> str:
    """Suggest a class of Lightning for a logger or callback, else its full path."""
    from lightning.pytorch import callbacks, loggers

    hint = nearest_name(name, (*loggers.__all__, *callbacks.__all__))
    return f".{hint}" if hint else f"; give its full path, such as package.module.{name}"


def check_files(parser: ArgumentParser, arguments: list[str]) -> None:
    """Refuse invalid keys that the parser accepts.

    Raises:
        UsageError: A group of keys has a plain value, or a key is set that a top-level key determines.
    """
    for word in arguments:
        if word.split("=")[0] in EVERY_FLAGS:
            raise UsageError(f"{word.split('=')[0]}: set --save_every_n_steps")
    groups = ["trainer", "model", "data", "callbacks", *(one.dest for one in _groups(parser))]
    decided = [f"{group}.{name}" for group in ("model", "data") for name in SHARED]
    for path in config_files(arguments):
        values = read_yaml(path)
        for key in sorted(set(groups), key=lambda one: one.count(".")):
            value = _value(values, key)
            if value is not MISSING and not isinstance(value, dict):
                raise UsageError(f"{key}: expected {KEYS_AND_VALUES}, got {value!r}{_where_set(key, arguments)}")
            # The parser would read the group as one of several classes.
            for name in ("class_path", "init_args"):
                if _value(values, f"{key}.{name}") is not MISSING:
                    unknown = f"{key}.{name}"
                    where = _where_set(unknown, arguments)
                    raise UsageError(f"unknown key {unknown!r}{where}.{_nearest(unknown, known_keys(parser))}")
        if _value(values, EVERY) is not MISSING:
            raise UsageError(f"{EVERY}{_where_set(EVERY, arguments)}: set save_every_n_steps, at the top level")
        for key in decided:
            if _value(values, key) is not MISSING:
                name = key.rpartition(".")[2]
                raise UsageError(
                    f"{key}{_where_set(key, arguments)}: set {name} at the top level, for both model and data"
                )


def check_values(config: Namespace, parser: ArgumentParser, arguments: list[str]) -> None:
    """Refuse values that the parser accepts and Lightning would fail on.

    Args:
        config: The parsed configuration.
        parser: The parser, which has types and defaults.
        arguments: The words of the command line.

    Raises:
        UsageError: Names the key, the value and the allowed values.
    """
    # The parser accepts null for any key of a file, regardless of its type.
    for action in actions(parser):
        key, default = action.dest, action.default
        if default not in (None, SUPPRESS) and config.get(key, default) is None and not _may_be_null(action):
            raise UsageError(f"{key}: {_no_null(default)}{_where_set(key, arguments)}")
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything: expected a number from 0 to {2**32 - 1}, true or false, got {seed}")
    if not config.output_dir:
        raise UsageError(f"output_dir: expected a folder, got {config.output_dir!r}")
    check_trainer(config.trainer)
    check_precision(config.trainer.precision)


def known_keys(parser: ArgumentParser) -> list[str]:
    """Return the paths of all keys that a configuration may hold."""
    others = ("config", "print_config", "print_shtab")
    return [one.dest for one in actions(parser) if one.dest not in others and one.dest.split(".")[-1] != "help"]


def _groups(parser: ArgumentParser) -> list[Action]:
    return [action for action in actions(parser) if hasattr(action, "basetype")]


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return MISSING
        values = values[part]
    return values


def _as_typed(name: str, parser: ArgumentParser) -> str:
    """Name an option as it is typed, and a positional argument as the usage names it."""
    action = next((one for one in actions(parser) if one.dest == name), None)
    if action is None:
        return name
    return action.option_strings[0] if action.option_strings else str(action.metavar or name)


def _may_be_null(action: Action) -> bool:
    return type(None) in get_args(type_of(action))


def _default_of(key: str, parser: ArgumentParser) -> Any:
    return next((action.default for action in actions(parser) if action.dest == key), None)


def _with_example(reason: str, default: Any) -> str:
    """Add a key's default to a reason that expects keys and values."""
    if not isinstance(default, dict) or not default:
        return reason
    example = yaml.safe_dump(default, default_flow_style=True).strip()
    return reason.replace(KEYS_AND_VALUES, f"{KEYS_AND_VALUES} such as {example}", 1)


def _no_null(default: Any) -> str:
    shown = default.class_path if hasattr(default, "class_path") else repr(default)
    return f"null is not allowed; omit the key for its default, {shown}"


def _see(parser: ArgumentParser) -> str:
    return f"; see: {parser.prog} --help"


def _unknown_key(message: str) -> str | None:
    for pattern in (
        r"[Uu]nrecognized arguments: --(?P<key>[^\s=]+)",
        r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
        r"(?:Option|Key) ['\"](?P<key>[^'\"]+)['\"] is not (?:accepted|expected)",
    ):
        match = re.search(pattern, message)
        if match:
            group = match.groupdict().get("group")
            if in_class := re.match(r'Parser key "([^"]+)":.*Problem with given class_path', message, re.DOTALL):
                group = in_class[1]
            return f"{group}.{match['key']}" if group else match["key"]
    return None


def _nearest(key: str, allowed: list[str]) -> str:
    """Suggest keys with the same name elsewhere, else a name for the first wrong part of the key's path."""
    name = key.rpartition(".")[2]
    name = OTHER_NAMES.get(name, name)
    if same := [one for one in allowed if one.rpartition(".")[2] == name and one != key]:
        return _suggested(same)
    hint = _nearest_part(key, allowed)
    ends = [one for one in allowed if one.endswith(f"_{name.rpartition('_')[2]}")]
    return _suggested(ends) if ends and "Did you mean" not in hint else hint


def _suggested(keys: list[str]) -> str:
    shortest = sorted(keys, key=lambda one: (len(one), one))[:MOST_SUGGESTED]
    return f" Did you mean {' or '.join(map(repr, shortest))}?"


def _nearest_part(key: str, allowed: list[str]) -> str:
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        inside = [one.removeprefix(f"{parent}.") for one in allowed if not parent or one.startswith(f"{parent}.")]
        names = sorted({one.split(".")[0] for one in inside})
        if names and part not in names:
            hint = nearest_name(part, names)
            prefix = f"{parent}." if parent else ""
            return (
                hint.replace(" '", f" '{prefix}", 1) or f" Allowed in {parent or 'a configuration'}: {', '.join(names)}"
            )
    return ""


def _reason(text: str) -> str:
    """Condense pydantic's and jsonargparse's explanations to one line."""
    if of_class := explain_class(text):
        return of_class
    text = text.partition("\n  Subclass types expect")[0]
    # The given value, after one or several expected types.
    got = re.search(r"(?:Got value|got|Given value): (.*)", text, re.DOTALL)
    value = f", got {got[1].strip()!r}" if got else ""
    if number := re.search(r"(?:invalid literal for (int)\(\).*|could not convert string to float): '(.*?)'", text):
        return f"expected {'an integer' if number[1] else 'a number'}, got {number[2]!r}"
    if restricted := re.search(r"Not of type \w+: (.*)does not conform to restriction v(.*)", text):
        given = got[1] if got else restricted[1]
        return f"must be {restricted[2].replace('and v', 'and ')}, got {given.strip()}"
    if fault := re.search(r"^\s*(?:Value error, )?(.+) \[type=\w+, input_value", text, re.MULTILINE):
        return f"{fault[1]}{value}"
    if "Unable to load config" in text:
        return f"expected {KEYS_AND_VALUES}, or a file of them, got {text.split(chr(39))[1]!r}"
    expected = dict.fromkeys(_plain_type(one) for one in re.findall(r"Expected an? ((?:typing\.|<).*?[\]>])", text))
    if list(expected) == ["null"]:
        # The other type was a class; its error is more specific.
        others = re.findall(r"^\s*- (?!Expected a)(.+)", text, re.MULTILINE)
        return f"{' '.join(others[-1].split())}{value}" if others else f"is not accepted{value}"
    if expected:
        return f"expected {' or '.join(expected)}{value}"
    for noise in NOISE:
        text = re.sub(noise, "", text.partition("Got value")[0])
    return " ".join(text.split()).rstrip(". ") + value


def _plain_type(text: str) -> str:
    if "Literal[" in text:
        return " or ".join(re.findall(r"[\w.+-]+", text.partition("Literal")[2]))
    names = {"NoneType": "null", "int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}
    name = re.sub(r"<class '([^']+)'>", r"\1", text)
    return {**names, "dict": KEYS_AND_VALUES, "list": "a list"}.get(name, name)


def _where_set(key: str, arguments: list[str]) -> str:
    """Return `` (FILE:LINE)`` if a configuration file sets the key, else an empty string."""
    if any(word.split("=")[0] == f"--{key}" for word in arguments):
        return ""
    for path in reversed(config_files(arguments)):
        line = _line_of(key.split("."), yaml.compose(path.read_text(encoding="utf-8")))
        if line is not None:
            return f" ({path}:{line})"
    return ""


def _line_of(parts: list[str], node: yaml.Node | None) -> int | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == parts[0]:
            return name.start_mark.line + 1 if len(parts) == 1 else _line_of(parts[1:], value)
    return None
