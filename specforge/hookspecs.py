"""The plugin contract: what a package may add to specforge, as pluggy hooks that return plain descriptors.

A descriptor names classes and functions as ``"package.module:Name"``, so that a plugin module imports nothing heavy
and ``specforge --help`` runs without loading torch. Every hook is called once, when the registry is built; an empty
result means that the plugin adds nothing of that kind. A wrapper (``hookimpl(wrapper=True)``) is called around the
hook of every plugin; it gets and returns a list with that plugin's result.
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
        name: Value of ``algorithm:`` in a configuration, and of ``speculators_config.algorithm`` in a checkpoint.
        summary: One line for ``specforge plugins`` and ``--help``.
        config: The ``SpeculatorModelConfig`` subclass that is stored in a checkpoint.
        model: The ``SpeculatorModel`` subclass: the network.
        module: The ``DraftModule`` subclass (LightningModule) that trains it; None if it can only be loaded.
        data: The ``DraftDataModule`` subclass (LightningDataModule) that feeds it; None if it can only be loaded.
        proposals: Names of the proposal methods that its drafts support; empty if they cannot draft at all.
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
    """A way to propose candidate tokens.

    Attributes:
        name: Value of ``proposal_type`` in a checkpoint.
        summary: One line for ``specforge plugins``.
        config: The ``TokenProposalConfig`` subclass with its settings.
        proposer: The ``specforge.proposals.proposal.Proposer`` subclass that implements it.
    """

    name: str
    summary: str
    config: str
    proposer: str


@dataclass(frozen=True)
class Objective:
    """A training loss over draft and verifier distributions.

    Attributes:
        name: Value of ``model.objective`` in a configuration.
        summary: One line for ``specforge plugins``.
        function: Maps ``specforge.training.losses.objectives.Distributions`` of n rows to n loss values.
        uses_mean_acceptance: Whether the function reads ``Distributions.mean_acceptance``, which costs an extra pass.
        uses_text: Whether the function reads ``Distributions.text``.
        closed_form: Whether the function reads nothing but ``specforge.training.losses.objectives.PairSums``. GPUs then
            compute it with a kernel, much faster.
    """

    name: str
    summary: str
    function: str
    uses_mean_acceptance: bool = False
    uses_text: bool = False
    closed_form: bool = False


@dataclass(frozen=True)
class Weighting:
    """Loss weights along a chain: a factor for each step, from the statistics of all steps of the same row.

    Attributes:
        name: Value of ``model.weighting`` in a configuration.
        summary: One line for ``specforge plugins``.
        function: Maps the statistic of each step and row, [S, R], and a mask of those that count, bool [S, R], to
            factors.
        statistic: Maps ``specforge.training.losses.objectives.Distributions`` of n rows to n numbers.
        uses_text: Whether the statistic reads ``Distributions.text``.
        closed_form: Whether the statistic reads nothing but ``PairSums``, as for ``Objective``.
    """

    name: str
    summary: str
    function: str
    statistic: str
    uses_text: bool = False
    closed_form: bool = False


@dataclass(frozen=True)
class LayerFamily:
    """A model family for draft layers.

    Attributes:
        name: Value of ``model.draft.layer_type`` in a configuration; the model type of the family's configuration.
        summary: One line for ``specforge plugins``.
        family: A ``specforge.models.base_components.Family`` with its building blocks.
    """

    name: str
    summary: str
    family: str


@dataclass(frozen=True)
class CheckpointFormat:
    """A checkpoint format for the drafts of one algorithm, as an engine reads it.

    Attributes:
        name: Value of ``specforge export --format``; other algorithms may have a format of the same name.
        summary: One line for ``specforge plugins``.
        algorithm: Name of the algorithm whose drafts it holds.
        layout: The ``specforge.checkpoints.layout.Layout`` subclass that reads, writes and checks it.
    """

    name: str
    summary: str
    algorithm: str
    layout: str


@dataclass(frozen=True)
class FeatureTransport:
    """A way in which states come from a serving engine.

    Attributes:
        name: Value of ``specforge prepare features --transport``.
        summary: One line for ``specforge plugins``.
        transport: The ``specforge.data.features.transports.Transport`` class, which takes no arguments.
    """

    name: str
    summary: str
    transport: str


@dataclass(frozen=True)
class Command:
    """A subcommand of ``specforge``.

    Attributes:
        name: The word after ``specforge``.
        summary: One line for ``specforge --help``.
        run: ``function(arguments: list[str]) -> int``; the result is the exit status.
        parser: ``function() -> argparse.ArgumentParser``, used for shell completion; None completes only its name.
    """

    name: str
    summary: str
    run: str
    parser: str | None = None


Descriptor = (
    Algorithm | ProposalMethod | Objective | Weighting | LayerFamily | CheckpointFormat | FeatureTransport | Command
)


@hookspec
def specforge_algorithms() -> Iterable[Algorithm]:
    """Return the algorithms that this plugin adds."""
    raise NotImplementedError


@hookspec
def specforge_proposals() -> Iterable[ProposalMethod]:
    """Return proposal methods that work with several algorithms."""
    raise NotImplementedError


@hookspec
def specforge_objectives() -> Iterable[Objective]:
    """Return training losses."""
    raise NotImplementedError


@hookspec
def specforge_weightings() -> Iterable[Weighting]:
    """Return loss weightings along a chain."""
    raise NotImplementedError


@hookspec
def specforge_layer_families() -> Iterable[LayerFamily]:
    """Return model families for draft layers."""
    raise NotImplementedError


@hookspec
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """Return checkpoint formats to export to or convert from."""
    raise NotImplementedError


@hookspec
def specforge_feature_transports() -> Iterable[FeatureTransport]:
    """Return ways in which states come from a serving engine."""
    raise NotImplementedError


@hookspec
def specforge_commands() -> Iterable[Command]:
    """Return subcommands of ``specforge``."""
    raise NotImplementedError
