"""DFlash (https://arxiv.org/abs/2602.06036), DFlash2 and DSpark for specforge: drafts that propose blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, ProposalMethod, hookimpl

BLOCK_PROPOSALS = ("greedy", "sampling", "static_tree", "dynamic_tree", "short_block")


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
            proposals=BLOCK_PROPOSALS,
        ),
        Algorithm(
            name="dflash2",
            summary="DFlash2: DFlash with convolutions along the block and a selector among candidates",
            config="specforge_dflash.config:DFlash2SpeculatorConfig",
            model="specforge_dflash.dflash2:DFlash2DraftModel",
            module="specforge_dflash.dflash2_module:DFlash2Module",
            data="specforge.data.module:DraftDataModule",
            proposals=BLOCK_PROPOSALS,
        ),
        Algorithm(
            name="dspark",
            summary="DSpark: DFlash with a Markov head along the block and a confidence of each token",
            config="specforge_dflash.config:DSparkSpeculatorConfig",
            model="specforge_dflash.dspark:DSparkDraftModel",
            module="specforge_dflash.dspark_module:DSparkModule",
            data="specforge.data.module:DraftDataModule",
            proposals=(*BLOCK_PROPOSALS, "confident_chain"),
        ),
    ]


@hookimpl
def specforge_proposals() -> Iterable[ProposalMethod]:
    """A chain that ends by DSpark's confidence, and one of a shorter block."""
    return [
        ProposalMethod(
            "confident_chain",
            "a chain that ends where DSpark's confidence in it does",
            config="specforge_dflash.confident_chain:ConfidentChainTokenProposalConfig",
            proposer="specforge_dflash.confident_chain:ConfidentChainProposer",
        ),
        ProposalMethod(
            "short_block",
            "a chain from a block of its length, as a server runs it that is asked for fewer tokens than trained",
            config="specforge_dflash.short_block:ShortBlockTokenProposalConfig",
            proposer="specforge_dflash.short_block:ShortBlockProposer",
        ),
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layouts that readers of block drafts want, the same for each algorithm."""
    return [
        CheckpointFormat(name, summary, algorithm=algorithm, layout=layout)
        for algorithm in ("dflash", "dflash2", "dspark")
        for name, summary, layout in (
            (
                "speculators",
                "the speculators layout, 0.9; llama.cpp reads it of dspark",
                "specforge_dflash.formats:BlockSpeculatorsLayout",
            ),
            (
                "vllm",
                "vLLM, method dflash or dspark: the speculators layout within what vLLM runs right",
                "specforge_dflash.formats:VLLMBlockLayout",
            ),
            (
                "plain",
                "a Qwen3 configuration with dflash_config: z-lab, DeepSpec, SGLang, llama.cpp",
                "specforge_dflash.plain:PlainBlockLayout",
            ),
        )
    ]
