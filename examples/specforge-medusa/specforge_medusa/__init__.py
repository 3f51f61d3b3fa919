"""Medusa heads (https://arxiv.org/abs/2401.10774) for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, Command, Objective, ProposalMethod, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """One head for each drafted token; all heads read the same state."""
    return [
        Algorithm(
            name="medusa",
            summary="Medusa: independent heads on the verifier's last state",
            config="specforge_medusa.config:MedusaConfig",
            model="specforge_medusa.model:MedusaModel",
            module="specforge_medusa.module:MedusaModule",
            data="specforge_medusa.data:MedusaDataModule",
            proposals=("greedy", "sampling", "static_tree", "dynamic_tree", "medusa_tree"),
        )
    ]


@hookimpl
def specforge_proposals() -> Iterable[ProposalMethod]:
    """A tree for independent heads; any other draft may also propose it."""
    return [
        ProposalMethod(
            "medusa_tree",
            "Medusa's sparse tree: fewer nodes for less probable tokens",
            config="specforge_medusa.proposal:SparseTreeTokenProposalConfig",
            proposer="specforge_medusa.proposal:SparseTreeProposer",
        )
    ]


@hookimpl
def specforge_objectives() -> Iterable[Objective]:
    """The criterion of greedy acceptance."""
    return [
        Objective(
            "medusa_top_token",
            "cross-entropy with the verifier's most probable token",
            "specforge_medusa.objectives:top_token_cross_entropy",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layout in which specforge stores drafts; the core writes it for any algorithm."""
    return [
        CheckpointFormat(
            "speculators",
            "the speculators layout, as specforge stores it; no engine loads it",
            algorithm="medusa",
            layout="specforge.checkpoints.speculators:SpeculatorsLayout",
        )
    ]


@hookimpl
def specforge_commands() -> Iterable[Command]:
    """A command that shows the heads' proposals."""
    return [
        Command(
            "medusa-heads",
            "show what each Medusa head proposes after a text",
            run="specforge_medusa.command:run",
            parser="specforge_medusa.command:command_line",
        )
    ]
