"""The plugin contract: what a package may add to specforge, as pluggy hooks that return plain descriptors.

A descriptor names classes and functions as ``"package.module:Name"``, so that a plugin module imports nothing heavy
and ``specforge --help`` answers without loading torch. Every hook is called once, when the registry is built; an
empty answer means that the plugin adds nothing of that kind. A wrapper (``hookimpl(wrapper=True)``) is called around
the hook of every plugin, and gets and returns a list with the answer of that plugin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pluggy

PROJECT = "specforge"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Algorithm:
    """A way to train a draft.

    Attributes:
        name: What ``algorithm:`` in a configuration says, and ``speculators_config.algorithm`` in a checkpoint.
        summary: One line for ``specforge plugins`` and ``--help``.
        config: The ``SpeculatorModelConfig`` subclass that is stored in a checkpoint.
        model: The ``SpeculatorModel`` subclass: the network.
        module: The ``DraftModule`` subclass (LightningModule) that trains it; None where it can only be loaded.
        data: The ``DraftDataModule`` subclass (LightningDataModule) that feeds it; None where it can only be loaded.
        proposals: Names of the proposal methods that its drafts can serve; empty where they cannot draft at all.
    """

    name: str
    summary: str
    config: str
    model: str
    module: str | None = None
    data: str | None = None
    proposals: tuple[str, ...] = ("greedy", "sampling", "static_tree", "dynamic_tree")


@dataclass(frozen=True)
class ProposalMethod:
    """A way to turn a draft into candidate tokens.

    Attributes:
        name: ``proposal_type`` in a checkpoint.
        summary: One line for ``specforge plugins``.
        config: The ``TokenProposalConfig`` subclass: its settings, as they are stored.
        proposer: The ``specforge.proposals.proposal.Proposer`` subclass: the method at work.
    """

    name: str
    summary: str
    config: str
    proposer: str


@dataclass(frozen=True)
class Objective:
    """A training loss over draft and verifier distributions.

    Attributes:
        name: What ``model.objective`` in a configuration says.
        summary: One line for ``specforge plugins``.
        function: Maps ``specforge.training.losses.objectives.Distributions`` of n rows to n loss values.
        uses_mean_acceptance: Whether the function reads ``Distributions.mean_acceptance``, which costs one more pass.
        uses_text: Whether the function reads ``Distributions.text``.
    """

    name: str
    summary: str
    function: str
    uses_mean_acceptance: bool = False
    uses_text: bool = False


@dataclass(frozen=True)
class Weighting:
    """Weights along a chain: how much a step's loss counts, given what the steps of the same row achieved.

    Attributes:
        name: What ``model.weighting`` in a configuration says.
        summary: One line for ``specforge plugins``.
        function: Maps the statistic of each row and step, [S, R], and which of them count, bool [S, R], to factors.
        statistic: Maps ``specforge.training.losses.objectives.Distributions`` of n rows to n numbers.
        uses_text: Whether the statistic reads ``Distributions.text``.
    """

    name: str
    summary: str
    function: str
    statistic: str
    uses_text: bool = False


@dataclass(frozen=True)
class LayerFamily:
    """A model family that draft layers can be of.

    Attributes:
        name: What ``model.draft.layer_type`` in a configuration says; the model type of the family's configuration.
        summary: One line for ``specforge plugins``.
        family: A ``specforge.models.base_components.Family``: its building blocks.
    """

    name: str
    summary: str
    family: str


@dataclass(frozen=True)
class CheckpointFormat:
    """A form in which a reader wants the drafts of one algorithm.

    Attributes:
        name: What ``specforge export --format`` says; other algorithms may have a format of the same name.
        summary: One line for ``specforge plugins``.
        algorithm: Name of the algorithm whose drafts it holds.
        layout: The ``specforge.checkpoints.layout.Layout`` subclass that reads, writes and checks it.
    """

    name: str
    summary: str
    algorithm: str
    layout: str


@dataclass(frozen=True)
class Command:
    """A subcommand of ``specforge``.

    Attributes:
        name: The word after ``specforge``.
        summary: One line for ``specforge --help``.
        run: ``function(arguments: list[str]) -> int``; the result is the exit status.
        parser: ``function() -> argparse.ArgumentParser``, by which shells complete its words; None: its name alone.
    """

    name: str
    summary: str
    run: str
    parser: str | None = None


Descriptor = Algorithm | ProposalMethod | Objective | Weighting | LayerFamily | CheckpointFormat | Command


@hookspec
def specforge_algorithms() -> Iterable[Algorithm]:
    """Describe the algorithms that this plugin contributes."""
    raise NotImplementedError


@hookspec
def specforge_proposals() -> Iterable[ProposalMethod]:
    """Describe proposal methods that serve several algorithms."""
    raise NotImplementedError


@hookspec
def specforge_objectives() -> Iterable[Objective]:
    """Describe training losses."""
    raise NotImplementedError


@hookspec
def specforge_weightings() -> Iterable[Weighting]:
    """Describe weights along a chain."""
    raise NotImplementedError


@hookspec
def specforge_layer_families() -> Iterable[LayerFamily]:
    """Describe model families that draft layers can be of."""
    raise NotImplementedError


@hookspec
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """Describe checkpoint formats to export to or convert from."""
    raise NotImplementedError


@hookspec
def specforge_commands() -> Iterable[Command]:
    """Describe subcommands of ``specforge``."""
    raise NotImplementedError
