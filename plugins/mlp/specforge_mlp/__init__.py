"""The MLP speculator (https://arxiv.org/abs/2404.19124) for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, ProposalMethod, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """Heads without attention and without a cache, one for each drafted token."""
    return [
        Algorithm(
            name="mlp",
            summary="MLP speculator: one small head for each drafted token, no attention, trained in two stages",
            config="specforge_mlp.config:MLPSpeculatorConfig",
            model="specforge_mlp.model:MLPSpeculator",
            module="specforge_mlp.module:MLPModule",
            data="specforge_mlp.data:MLPDataModule",
            proposals=("greedy", "sampling", "static_tree", "dynamic_tree", "candidate_tree"),
        )
    ]


@hookimpl
def specforge_proposals() -> Iterable[ProposalMethod]:
    """The tree that was published with the MLP speculator."""
    return [
        ProposalMethod(
            "candidate_tree",
            "the most probable paths of a broad tree, as published for MLP speculators",
            config="specforge_mlp.candidate_tree:CandidateTreeTokenProposalConfig",
            proposer="specforge_mlp.candidate_tree:CandidateTreeProposer",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layout of the published speculators, and our own."""
    return [
        CheckpointFormat(
            "speculators",
            "the speculators layout, as specforge stores it; no engine loads it",
            algorithm="mlp",
            layout="specforge.checkpoints.speculators:SpeculatorsLayout",
        ),
        CheckpointFormat(
            "mlp_speculator",
            "IBM fms and transformers naming (speculator.emb.*, proj.*, head.*, ln.*)",
            algorithm="mlp",
            layout="specforge_mlp.layout:MLPSpeculatorLayout",
        ),
    ]
