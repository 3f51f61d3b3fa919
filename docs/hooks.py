"""What the site adds to the pages in this folder: every setting, from the code, and the files that pages link to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from specforge.commands.trainer import settings_parser
from specforge.hookspecs import Algorithm
from specforge.private.argparse import actions, type_of
from specforge.registry import installed

ROOT = Path(__file__).parents[1]
CONFIGURATION = "configuration.md"
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
INTRODUCTION = """\
# Every setting

Made from the code when this site is built, for each installed algorithm that trains. A key is also a flag,
`--KEY VALUE`. The settings of `trainer` are Lightning's own, named as the arguments of its
[Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html); `specforge fit --algorithm NAME --help` lists
them too.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of settings, the pages that lie in the root, and what pages link to outside this folder."""
    files.append(File.generated(config, CONFIGURATION, content=configuration()))
    linked = {target for file in files.documentation_pages() for target in _outside(file)}
    for name in sorted(linked | set(ROOT_PAGES)):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source, folder = _in_repository(page.file), posixpath.dirname(page.file.src_uri)

    def on_site(match: re.Match[str]) -> str:
        target = _target(source, match[1]).removeprefix("docs/")
        return f"]({posixpath.relpath(target, folder or '.')}"

    return LINK.sub(on_site, markdown)


def _outside(file: File) -> Iterator[str]:
    for link in LINK.findall(file.content_string):
        target = _target(_in_repository(file), link)
        if not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def _in_repository(file: File) -> str:
    in_docs = file.generated_by is None or file.src_uri == CONFIGURATION
    return f"docs/{file.src_uri}" if in_docs else file.src_uri


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def configuration() -> str:
    """Return the page of settings: a table for each part of an algorithm's configuration."""
    algorithms = {name: one for name, one in installed().all(Algorithm).items() if one.module and one.data}
    return "\n".join([INTRODUCTION, *(_section(name, algorithms[name]) for name in sorted(algorithms))])


def _section(name: str, algorithm: Algorithm) -> str:
    parser = settings_parser(algorithm)
    lines = [f"## {name}", "", f"{algorithm.summary[0].upper()}{algorithm.summary[1:]}.", ""]
    lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
    for action in filter(_is_own, actions(parser)):
        default = "required" if action.required else _shown(action.default)
        lines.append(_line(action.dest, type_of(action), default, action.help))
        lines += [
            _line(f"{action.dest}.{key}", _hint(field), _shown(field.default), field.description)
            for settings in get_args(type_of(action))
            if isinstance(settings, type) and issubclass(settings, BaseModel)
            for key, field in settings.model_fields.items()
        ]
    return "\n".join([*lines, ""])


def _line(key: str, hint: Any, default: str, meaning: str | None) -> str:
    return f"| `{key}` | {_cell(_values(hint))} | {default} | {_cell(meaning)} |"


def _hint(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _is_own(action: Any) -> bool:
    # Links are set elsewhere, and the trainer's settings are Lightning's.
    return not action.dest.startswith("trainer.") and type(action).__name__ == "ActionTypeHint"


def _shown(value: Any) -> str:
    """Write a default as YAML does."""
    if value is None:
        return "null"
    if (path := getattr(value, "class_path", None)) is not None:
        return f"`{path.rpartition('.')[2]}`"
    return _cell(f"`{str(value).lower() if isinstance(value, bool) else value}`")


def _values(hint: Any) -> str:
    """Describe a type as a person would: its name, its bounds, or the words that it allows."""
    inner = get_args(hint)
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if get_origin(hint) is Annotated:
        return ", ".join([_values(inner[0]), *_bounds(inner[1:])])
    if expression := getattr(hint, "_expression", None):
        return f"{hint._type.__name__}, {_read_out(expression)}"
    if inner and isinstance(get_origin(hint), type) and get_origin(hint) in (list, dict, tuple):
        return f"{get_origin(hint).__name__} of {', '.join(_values(one) for one in inner)}"
    if inner:
        return " or ".join(dict.fromkeys(_values(one) for one in inner))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _read_out(expression: str) -> str:
    """Turn jsonargparse's ``v>0 and v<=1`` into ``> 0 and ≤ 1``."""
    return re.sub(r"v(>=|<=|>|<)", lambda match: f"{match[1]} ".replace(">=", "≥").replace("<=", "≤"), expression)


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for one in metadata:
        yield from _bounds(tuple(getattr(one, "metadata", ())))
        yield from (f"{sign} {getattr(one, key):g}" for key, sign in signs.items() if hasattr(one, key))


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
