"""The plugin guide shows the examples' own code, and the example uses only the public parts of the core."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "specforge-medusa"
SMALL_EXAMPLE = ROOT / "examples" / "specforge-recurrent"
LISTING = re.compile(r"<!-- from (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
LISTINGS = LISTING.findall((ROOT / "docs" / "plugins.md").read_text(encoding="utf-8"))


def test_the_guide_lists_every_kind_of_contribution() -> None:
    assert {name for name, _ in LISTINGS if not name.startswith(("specforge_recurrent", "specforge_mlp"))} == {
        "pyproject.toml",
        *(
            f"specforge_medusa/{path.name}"
            for path in (EXAMPLE / "specforge_medusa").glob("*.py")
            if path.stem != "command"
        ),
    }


@pytest.mark.parametrize(("name", "listing"), LISTINGS, ids=[text.strip().splitlines()[-1] for _, text in LISTINGS])
def test_a_listing_is_part_of_the_example(name: str, listing: str) -> None:
    folders = (EXAMPLE, SMALL_EXAMPLE, ROOT / "plugins" / "mlp")
    source = next(path for path in (one / name for one in folders) if path.is_file()).read_text(encoding="utf-8")
    # A method, or a part of one, is shown without its indentation.
    assert any(textwrap.indent(listing, "    " * depth) in source for depth in range(3))


def test_the_example_imports_no_other_plugin_and_no_command() -> None:
    for path in (EXAMPLE / "specforge_medusa").rglob("*.py"):
        known = set(re.findall(r"^\s*(?:from|import) (specforge\w*(?:\.\w+)?)", path.read_text(encoding="utf-8"), re.M))
        others = {name for name in known if name.startswith("specforge_") and not name.startswith("specforge_medusa")}
        assert not others and "specforge.commands" not in known, path.name


@pytest.mark.parametrize("example", [EXAMPLE, SMALL_EXAMPLE], ids=lambda path: path.name)
def test_the_api_page_names_all_that_an_example_imports(example: Path) -> None:
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    for path in example.rglob("*.py"):
        imports = [one for one in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(one, ast.ImportFrom)]
        used = {f"{one.module}.{name.name}" for one in imports for name in one.names}
        core = {name for name in used if name.startswith("specforge.")}
        assert not {name for name in core if name not in named and name.rpartition(".")[0] not in named}, path.name


def test_examples_install_on_the_pythons_of_the_core() -> None:
    projects = [
        tomllib.loads((one / "pyproject.toml").read_text("utf-8"))["project"] for one in (ROOT, EXAMPLE, SMALL_EXAMPLE)
    ]
    assert len({project["requires-python"] for project in projects}) == 1
