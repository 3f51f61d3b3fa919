"""Finds the installed plugins and their contributions, without importing anything heavy.

A plugin is an entry point of the group ``specforge.plugins``. One that fails to import, or clashes with another, is
kept with its fault: commands that do not need it still work, and a command that needs it reports the fault.

pluggy calls the hooks of each plugin separately, so that every descriptor has one owner, and an exception in one plugin
does not affect the others. Wrappers take part in every call.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import itertools
import re
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar, cast

import pluggy

from specforge import hookspecs
from specforge.errors import UsageError, nearest_name
from specforge.hookspecs import (
    Algorithm,
    CheckpointFormat,
    Command,
    Descriptor,
    FeatureTransport,
    LayerFamily,
    Objective,
    ProposalMethod,
    Weighting,
)

GROUP = "specforge.plugins"
KINDS = {
    "algorithm": Algorithm,
    "proposal method": ProposalMethod,
    "objective": Objective,
    "weighting": Weighting,
    "layer family": LayerFamily,
    "checkpoint format": CheckpointFormat,
    "feature transport": FeatureTransport,
    "command": Command,
}
KindOfDescriptor = TypeVar(
    "KindOfDescriptor",
    Algorithm,
    ProposalMethod,
    Objective,
    Weighting,
    LayerFamily,
    CheckpointFormat,
    FeatureTransport,
    Command,
)


@dataclass
class Plugin:
    """One entry point: its package, its contributions and its faults."""

    name: str
    package: str
    version: str
    descriptors: list[Descriptor] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.package} {self.version})"


class Registry:
    """The plugins of a process and a lookup of their descriptors by kind and name."""

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self.plugins: list[Plugin] = []
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        registered = [_register(manager, point) for point in sorted(found, key=lambda point: point.name)]
        for plugin, module in registered:
            self.plugins.append(plugin)
            if module is not None:
                _collect(manager, plugin, module)
        self._mark_clashes()

    def _mark_clashes(self) -> None:
        for plugin in self.plugins:
            claims = Counter((_kind(one), key_of(one)) for one in plugin.descriptors)
            plugin.faults.extend(
                f"it has {number} of the {kind} {name!r}" for (kind, name), number in claims.items() if number > 1
            )
        for first, second in itertools.combinations(self.plugins, 2):
            if first.name == second.name:
                _record_clash("plugin", first.name, first, second)
            shared = {(_kind(one), key_of(one)) for one in first.descriptors} & {
                (_kind(one), key_of(one)) for one in second.descriptors
            }
            for kind, name in sorted(shared):
                _record_clash(kind, name, first, second)

    def all(self, kind: type[KindOfDescriptor]) -> dict[str, KindOfDescriptor]:
        """Return every descriptor of a kind, keyed by ``key_of``; one that two plugins claim is included once."""
        return {key_of(one): one for plugin in self.plugins for one in plugin.descriptors if isinstance(one, kind)}

    def find(self, kind: type[KindOfDescriptor], name: str) -> KindOfDescriptor:
        """Return the descriptor of that kind and name.

        Args:
            kind: Class of the descriptor.
            name: Its name, as returned by ``key_of``.

        Raises:
            UsageError: No working plugin provides it, or two plugins claim it. The message lists the installed names
                and the faults of unusable plugins.
        """
        word = _kind(kind)
        owners = [
            (plugin, one)
            for plugin in self.plugins
            for one in plugin.descriptors
            if isinstance(one, kind) and key_of(one) == name
        ]
        if len({id(plugin) for plugin, _ in owners}) > 1:
            raise UsageError(_clash(word, name, owners[0][0], owners[1][0]))
        if owners:
            return owners[0][1]
        known = sorted(self.all(kind))
        message = f"no installed plugin provides the {word} {name!r}; installed: {', '.join(known) or 'none'}."
        faults = [f"\n{plugin} is broken: {plugin.faults[0]}" for plugin in self.plugins if plugin.faults]
        raise UsageError(message + nearest_name(name, known) + "".join(faults))

    def load(self, descriptor: Descriptor, attribute: str) -> Any:
        """Import the class or function that a descriptor names in one of its attributes.

        Raises:
            UsageError: The attribute is None, or its target cannot be imported.
        """
        reference = getattr(descriptor, attribute)
        owner = next(plugin for plugin in self.plugins if descriptor in plugin.descriptors)
        what = f"{owner}: {_kind(descriptor)} {descriptor.name!r}"
        if reference is None:
            raise UsageError(f"{what} has no {attribute}")
        module_name, _, name = reference.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise UsageError(f"{what} names {reference}, which fails to import: {_last_line(error)}") from error
        if not hasattr(module, name):
            raise UsageError(f"{what} names {reference}, which does not exist." + nearest_name(name, dir(module)))
        return getattr(module, name)


def key_of(descriptor: Descriptor) -> str:
    """Return the lookup key of a descriptor: its name, or ``"ALGORITHM/NAME"`` for a checkpoint format."""
    if isinstance(descriptor, CheckpointFormat):
        return f"{descriptor.algorithm}/{descriptor.name}"
    return descriptor.name


@functools.cache
def installed() -> Registry:
    """Return the registry of the plugins installed in this environment."""
    return Registry(entry_points(group=GROUP))


def _register(manager: pluggy.PluginManager, entry_point: EntryPoint) -> tuple[Plugin, ModuleType | None]:
    """Import a plugin and register its hooks; on failure, return it with its fault and no module."""
    package, version = ("?", "?")
    if entry_point.dist is not None:
        package, version = entry_point.dist.name, entry_point.dist.version
    plugin = Plugin(entry_point.name, package, version)
    registered_as = f"{entry_point.name} of {package}"
    try:
        module = entry_point.load()
        manager.register(module, registered_as)
        manager.check_pending()
    except (Exception, SystemExit) as error:
        plugin.faults.append(_last_line(error))
        # A plugin that stays registered with a misspelt hook would make every later check fail.
        if manager.has_plugin(registered_as):
            manager.unregister(name=registered_as)
        return plugin, None
    return plugin, module


def _collect(manager: pluggy.PluginManager, plugin: Plugin, module: ModuleType) -> None:
    """Call the hooks of one plugin, inside the wrappers of all plugins, and store its descriptors."""
    try:
        for hook in manager.get_hookcallers(module) or []:
            others = [one.plugin for one in hook.get_hookimpls() if one.plugin is not module and not _wraps(one)]
            if any(one.plugin is module and not _wraps(one) for one in hook.get_hookimpls()):
                plugin.descriptors.extend(_contributions(manager.subset_hook_caller(hook.name, others)))
    except (Exception, SystemExit) as error:
        plugin.faults.append(_last_line(error))
    plugin.faults.extend(fault for one in plugin.descriptors for fault in _missing_targets(one))


def _wraps(implementation: pluggy.HookImpl) -> bool:
    return implementation.wrapper or implementation.hookwrapper


def _contributions(hook: pluggy.HookCaller) -> Iterable[Descriptor]:
    # pluggy drops a result of None, which is a forgotten return.
    for contributed in hook() or [None]:
        if not isinstance(contributed, Iterable):
            raise TypeError(f"{hook.name} must return descriptors of specforge.hookspecs, got {contributed!r}")
        for descriptor in contributed:
            if not isinstance(descriptor, tuple(KINDS.values())):
                raise TypeError(f"{hook.name} must return descriptors of specforge.hookspecs, got {descriptor!r}")
            yield cast(Descriptor, descriptor)


def _missing_targets(descriptor: Descriptor) -> Iterable[str]:
    """Find references to names that do not exist; reads the source, so that nothing heavy is imported."""
    for attribute in fields(descriptor):
        reference = getattr(descriptor, attribute.name)
        if attribute.name in ("name", "summary", "algorithm") or not isinstance(reference, str):
            continue
        module_name, _, name = reference.partition(":")
        if fault := _fault_of(module_name, name):
            yield f"{_kind(descriptor)} {descriptor.name!r} names {reference}, {fault}"


def _fault_of(module_name: str, name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    except Exception as error:  # find_spec imports the parent package, which may fail in any way
        return f"whose package fails to import: {_last_line(error)}"
    if spec is None or not name:
        return "which does not exist"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        with open(spec.origin, encoding="utf-8") as file:
            text = file.read()
        # Nearly all are found so; to parse all modules takes a quarter of a second, at the start of every command.
        is_defined = re.search(rf"^(?:class|def) {re.escape(name)}\b", text, re.MULTILINE)
        return None if is_defined or name in _names_in(ast.parse(text)) else "which does not exist"
    except (SyntaxError, ValueError, OSError) as error:
        return f"which cannot be read: {_last_line(error)}"


def _names_in(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _kind(descriptor: Descriptor | type) -> str:
    wanted = descriptor if isinstance(descriptor, type) else type(descriptor)
    return next(word for word, kind in KINDS.items() if kind is wanted)


def _clash(kind: str, name: str, first: Plugin, second: Plugin) -> str:
    return (
        f"two installed packages provide the {kind} {name!r}: {first.package} {first.version} and "
        f"{second.package} {second.version}; uninstall one of them"
    )


def _record_clash(kind: str, name: str, first: Plugin, second: Plugin) -> None:
    for plugin in (first, second):
        plugin.faults.append(_clash(kind, name, first, second))


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()
