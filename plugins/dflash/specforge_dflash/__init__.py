"""DFlash (https://arxiv.org/abs/2602.06036), DFlash2 and DSpark for specforge: drafts that propose blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, ProposalMethod, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """Block drafters: one backbone, with other heads."""
    return [
        Algorithm(
            name="dflash",
            summary="DFlash: a whole block of tokens in one pass, each predicted from the context only",
            config="specforge_dflash.config:DFlashSpeculatorConfig",
            model="specforge_dflash.model:DFlashDraftModel",
            module="specforge_dflash.module:DFlashModule",
            data="specforge.data.module:DraftDataModule",
        ),
        Algorithm(
            name="dflash2",
            summary="DFlash2: DFlash with convolutions along the block and a selector among candidates",
            config="specforge_dflash.config:DFlash2SpeculatorConfig",
            model="specforge_dflash.dflash2:DFlash2DraftModel",
            module="specforge_dflash.dflash2_module:DFlash2Module",
            data="specforge.data.module:DraftDataModule",
        ),
        Algorithm(
            name="dspark",
            summary="DSpark: DFlash with a Markov head along the block and a confidence of each token",
            config="specforge_dflash.config:DSparkSpeculatorConfig",
            model="specforge_dflash.dspark:DSparkDraftModel",
            module="specforge_dflash.dspark_module:DSparkModule",
            data="specforge.data.module:DraftDataModule",
            proposals=("greedy", "sampling", "static_tree", "dynamic_tree", "confident_chain"),
        ),
    ]


@hookimpl
def specforge_proposals() -> Iterable[ProposalMethod]:
    """What DSpark's confidence is for."""
    return [
        ProposalMethod(
            "confident_chain",
            "a chain that ends where DSpark's confidence in it does",
            config="specforge_dflash.confident_chain:ConfidentChainTokenProposalConfig",
            proposer="specforge_dflash.confident_chain:ConfidentChainProposer",
        )
    ]
