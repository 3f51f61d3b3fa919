"""The plugin API as text. A change breaks or extends a promise; docs/versioning.md states which number to raise."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import get_args

import pluggy
import pytest

from specforge import hookspecs, registry

SIGNATURES = """\
Algorithm(name: str, summary: str, config: str, model: str, module: str | None = None, data: str | None = None, \
proposals: tuple[str, ...] = ('greedy', 'sampling', 'static_tree', 'dynamic_tree'))
CheckpointFormat(name: str, summary: str, algorithm: str, layout: str)
Command(name: str, summary: str, run: str, parser: str | None = None)
FeatureTransport(name: str, summary: str, transport: str)
LayerFamily(name: str, summary: str, family: str)
Objective(name: str, summary: str, function: str, uses_mean_acceptance: bool = False, uses_text: bool = False, \
closed_form: bool = False)
ProposalMethod(name: str, summary: str, config: str, proposer: str)
Weighting(name: str, summary: str, function: str, statistic: str, uses_text: bool = False, closed_form: bool = False)
specforge_algorithms() -> Iterable[Algorithm]
specforge_checkpoint_formats() -> Iterable[CheckpointFormat]
specforge_commands() -> Iterable[Command]
specforge_feature_transports() -> Iterable[FeatureTransport]
specforge_layer_families() -> Iterable[LayerFamily]
specforge_objectives() -> Iterable[Objective]
specforge_proposals() -> Iterable[ProposalMethod]
specforge_weightings() -> Iterable[Weighting]
"""
DESCRIPTORS = get_args(hookspecs.Descriptor)


def signature(named: type | object) -> str:
    """Return name, arguments, defaults and result of a hook or descriptor, with types without their modules."""
    found = str(inspect.signature(named, eval_str=True))
    for module in ("collections.abc.", "specforge.hookspecs."):
        found = found.replace(module, "")
    return named.__name__ + found.removesuffix(" -> None")


def hooks() -> list[object]:
    """Every function that pluggy recognises as a hook."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    return [
        value for name, value in vars(hookspecs).items() if manager.parse_hookspec_opts(hookspecs, name) is not None
    ]


def test_signatures():
    found = sorted(map(signature, [*DESCRIPTORS, *hooks()]))
    assert found == SIGNATURES.splitlines(), "the plugin API has changed, see docs/versioning.md"


def test_every_dataclass_of_the_contract_is_covered():
    declared = [value for value in vars(hookspecs).values() if inspect.isclass(value) and is_dataclass(value)]
    assert set(declared) == set(DESCRIPTORS) == set(registry.KINDS.values())


@pytest.mark.parametrize("kind", DESCRIPTORS, ids=lambda kind: kind.__name__)
def test_descriptors_are_frozen(kind):
    descriptor = kind(*["x"] * len(fields(kind)))
    with pytest.raises(FrozenInstanceError):
        descriptor.name = "y"


def test_names_of_project_and_entry_point_group():
    assert (hookspecs.PROJECT, registry.GROUP) == ("specforge", "specforge.plugins")
