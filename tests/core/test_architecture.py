"""Architecture rules checked on the source: allowed imports, no algorithm names in the core, docstrings everywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from textwrap import dedent

import pytest

from specforge.hookspecs import Algorithm
from specforge.registry import installed

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "specforge").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))

GROUND = {
    *("registry", "hookspecs", "config", "errors", "files", "bounds"),
    *("sampling", "drawing", "documents", "flash", "moving", "precision", "quiet", "interrupts", "imports", "private"),
}
FEATURES = GROUND | {"verifier"}
DRAFTS = FEATURES | {"models", "models/chain", "models/block", "proposals", "decoding"}
ROWS = {"data/text", "data/rows"}
DATA = ROWS | {"data", "data/features"}
TRAINING = {"training", "training/losses", "training/callbacks", "training/cli"}
CHECKPOINTS = {"checkpoints", "checkpoints/verification"}
# Allowed imports between rooms. A subfolder is a separate room only if it is listed here.
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    "builtin": {"hookspecs"},
    "__main__": GROUND,
    "verifier": GROUND,
    "data/text": GROUND | ROWS,  # a folder of token rows is a source, too
    "data/rows": GROUND | ROWS,
    "engines": GROUND | ROWS,
    "data/features": FEATURES | DATA | {"engines"},
    "data": GROUND | DATA,
    "models": FEATURES,
    "models/chain": FEATURES | {"models"},
    "models/block": FEATURES | {"models", "models/chain"},
    "proposals": FEATURES | {"models"},
    "decoding": FEATURES | {"models", "proposals"},
    "evaluation": DRAFTS | ROWS | {"engines"},
    "training/losses": DRAFTS | {"training"},
    "training": DRAFTS | DATA | {"training/losses"},
    "training/callbacks": DRAFTS | DATA | {"training", "training/losses"},
    "training/cli": DRAFTS | DATA | TRAINING,
    "checkpoints": DRAFTS | ROWS | CHECKPOINTS,
    "checkpoints/verification": DRAFTS | ROWS | CHECKPOINTS | {"engines"},
    "estimation": DRAFTS | DATA | {"training", "training/losses"},
    "commands": DRAFTS | DATA | TRAINING | CHECKPOINTS | {"engines", "evaluation", "estimation"},
    # The package's ``__init__`` imports names of two rooms on first use.
    "__init__": {"config", "models"},
}
# Rooms that a room may import only inside functions: a draft's ``generate`` uses decoding, and a module configures the
# callbacks of its trainer; both are higher rooms.
MAY_IMPORT_LAZILY = {"models": {"decoding"}, "training": {"training/callbacks"}}


def relative(path: Path) -> str:
    """Return a file's name for messages."""
    return str(path.relative_to(ROOT))


def room_at(parts: Sequence[str]) -> str:
    """Return the room of a path in the core: the deepest folder listed above, or else the outermost folder."""
    rooms = ("/".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return next((room for room in rooms if room in MAY_IMPORT), parts[0])


def room_of(path: Path) -> str:
    """Return the room that a file of the core belongs to."""
    return room_at(path.relative_to(ROOT / "specforge").with_suffix("").parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import in a module, nested ones too; ``from a import b`` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the imported room"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_rooms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and room of each import of the core in a module; ``__init__`` for the package itself."""
    for line, name in imported(tree):
        parts = name.split(".")
        if parts[0] == "specforge":
            inside = parts[1] if len(parts) > 1 else "__init__"
            is_room = (ROOT / "specforge" / inside).is_dir() or (ROOT / "specforge" / f"{inside}.py").is_file()
            yield line, room_at(parts[1:]) if is_room else "__init__"


def test_the_source_is_found():
    assert {"config.py", "registry.py", "__main__.py"} <= {path.name for path in CORE}
    assert any(path.name == "model.py" for path in PLUGINS)


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_rooms_import_only_lower_rooms(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{relative(path)}: a new room; list here what it may import"
    allowed = MAY_IMPORT[room] | {room}
    if room == "__main__":
        allowed = allowed | {"__init__"}  # the version
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    called = {
        found
        for function in functions
        for found in imported_rooms(function)
        if found[1] in MAY_IMPORT_LAZILY.get(room, ())
    }
    known = (found for found in imported_rooms(tree) if found not in called)
    wrong = [f"{relative(path)}:{line} imports {other}" for line, other in known if other not in allowed]
    assert not wrong


def test_the_core_imports_no_plugin():
    wrong = [
        f"{relative(path)}:{line} {name}"
        for path in CORE
        for line, name in imported(ast.parse(path.read_text()))
        if name.startswith("specforge_")
    ]
    assert not wrong


# A plugin whose paper modifies another's network, as a subclass.
BUILT_ON = {"specforge_peagle": "specforge_eagle3"}


def test_plugins_import_neither_commands_nor_each_other():
    wrong = []
    for path in PLUGINS:
        own = path.relative_to(ROOT / "plugins").parts[1]
        for line, name in imported(ast.parse(path.read_text())):
            other_plugin = name.startswith("specforge_") and name.split(".")[0] not in (own, BUILT_ON.get(own))
            if other_plugin or name.startswith(("specforge.commands", "specforge.__main__", "specforge.builtin")):
                wrong.append(f"{relative(path)}:{line} {name}")
    assert not wrong


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each module, name and attribute in a module that begins with one underscore."""
    for line, name in imported(tree):
        yield from ((line, part) for part in name.split(".") if re.match(r"_[^_]", part))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            yield node.lineno, node.attr


def own_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module defines, in classes and on objects too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_private_names_of_other_packages_are_touched_in_one_room():
    trees = {path: ast.parse(path.read_text()) for path in (*CORE, *PLUGINS) if path.parent.name != "private"}
    ours = {name for tree in trees.values() for name in own_names(tree)} | {"_exit"}  # documented, of os
    wrong = [
        f"{relative(path)}:{line} {name}"
        for path, tree in trees.items()
        for line, name in private_names(tree)
        if name not in ours
    ]
    assert not wrong, "move them to specforge/private and test them there"


def test_a_plugin_init_imports_only_the_contract():
    for path in PLUGINS:
        if path.name == "__init__.py":
            names = {name for _, name in imported(ast.parse(path.read_text()))}
            wrong = {
                name for name in names if not name.startswith(("specforge.hookspecs", "__future__", "collections.abc"))
            }
            assert not wrong, relative(path)


def lines_with_names(tree: ast.Module, names: Container[str]) -> Iterator[int]:
    """Yield the lines where some names are string constants: in comparisons, lookups or tables."""
    yield from (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names)


def test_the_core_names_no_algorithm():
    """Prose may name them."""
    names = set(installed().all(Algorithm))
    trees = ((path, ast.parse(path.read_text())) for path in CORE)
    wrong = [f"{relative(path)}:{line}" for path, tree in trees for line in lines_with_names(tree, names)]
    assert not wrong, "\n".join(wrong)


def test_a_comparison_with_a_name_is_found():
    source = """
    '''As in EAGLE-3 and mlp.'''
    if algorithm == "mlp" or algorithm in {"eagle": 1}:
        print("no mlp here")
    """
    assert list(lines_with_names(ast.parse(dedent(source)), {"mlp", "eagle"})) == [3, 3]


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=relative)
def test_public_functions_and_classes_have_docstrings_and_annotations(path):
    wrong = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                wrong.append(f"{node.name} has no docstring")
            methods = [
                part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
            ]
            wrong += [f"{node.name}.{method.name} {fault}" for method in methods for fault in _faults(method)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            wrong += [f"{node.name} {fault}" for fault in _faults(node)]
    assert not wrong


def _faults(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    overloads = [
        decorator
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Name) and decorator.id == "overload"
    ]
    if not ast.get_docstring(function) and not overloads:
        yield "has no docstring"
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    for argument in arguments:
        if argument is not None and argument.annotation is None and argument.arg not in ("self", "cls"):
            yield f"has no annotation of {argument.arg}"
    if function.returns is None:
        yield "has no annotation of its result"


SECTIONS = {"Args:", "Attributes:", "Raises:", "Returns:", "Yields:"}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring of a file, those of attributes included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, dedent(" " * node.col_offset + node.value.value)


def style_faults(text: str) -> Iterator[str]:
    """Yield style faults: Google style, double backticks, sentences with a capital and a full stop."""
    if re.search(r"(?<![`\\])`(?![`<])[^`\n]+`(?!`)", text):
        yield "single backticks"
    section, entry = "", ""
    for line in [*text.split("\n"), "end"]:
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        begins = indent == 4 and section not in ("Returns:", "Yields:")
        if stripped and entry and (begins or not indent) and entry[-1] not in ".:":
            yield f"no full stop: {entry}"
        if stripped and not indent:
            section, entry = stripped if stripped in SECTIONS else "", ""
        elif stripped and section:
            if begins and re.match(r"\*{0,2}\w+: [a-z]+\b(?![_(.*/=\[])", stripped):
                yield f"lower case: {stripped}"
            entry = stripped


def test_docstrings_have_one_style() -> None:
    every = [*CORE, *PLUGINS, *sorted((ROOT / "examples").rglob("*.py"))]
    found = [
        f"{relative(path)}:{line}: {fault}"
        for path in every
        for line, text in docstrings(path)
        for fault in style_faults(text)
    ]
    assert not found, "\n".join(found)
