"""What the site adds to the pages in this folder: every setting, from the code, and the files that pages link to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from specforge.commands.trainer import settings_parser
from specforge.hookspecs import Algorithm
from specforge.registry import installed
from specforge.training.cli.settings import Setting, settings

ROOT = Path(__file__).parents[1]
CONFIGURATION = "configuration.md"
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
API_NAME = re.compile(r'(?<=<span class="doc doc-object-name )[^<]+')
CODE = re.compile(r"(?<=<code>).+?(?=</code>)", re.DOTALL)
# A tag, or a word at whose signs a browser may break the line.
TAG_OR_WORD = re.compile(r"<[^>]+>|(?=[^\s<>]*\w)[^\s<>]*[^\w\s<>][^\s<>]*")
LONGEST = 41  # characters in a line of a listing on a phone
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


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark the words of keys and commands that are not to be broken; the API's long names break after a dot."""
    html = API_NAME.sub(lambda name: name[0].replace(".", ".<wbr>"), html)
    return CODE.sub(lambda code: TAG_OR_WORD.sub(_unbroken, code[0]), html)


def _unbroken(match: re.Match[str]) -> str:
    word = match[0]
    classes = "unbroken" if len(unescape(word)) <= LONGEST else "unbroken long"
    return word if word.startswith("<") else f'<span class="{classes}">{word}</span>'


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
    lines = [f"## {name}", "", f"{algorithm.summary[0].upper()}{algorithm.summary[1:]}.", ""]
    # Two columns, so that neither keys nor meanings are cut on a page of usual width; one on a phone.
    lines += ['<div class="settings" markdown>', "", "| key | meaning, values and default |", "|---|---|"]
    # The trainer's settings are Lightning's.
    own = (one for one in settings(settings_parser(algorithm)) if not one.key.startswith("trainer."))
    return "\n".join([*lines, *map(_line, own), "", "</div>", ""])


def _line(one: Setting) -> str:
    default = "required" if one.default is None else f"default: `{one.default}`"
    return f"| `{one.key}` | {_cell(one.meaning)}<br>{_cell(f'{one.values}; {default}')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
