"""The core's own contributions, through the same hooks as any plugin."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import (
    Command,
    FeatureTransport,
    LayerFamily,
    Objective,
    ProposalMethod,
    Weighting,
    hookimpl,
)

_OBJECTIVES = "specforge.training.losses.objectives"
_MOONCAKE = "specforge.data.features.mooncake"
_TRANSPORTS = "specforge.data.features.transports"
_WEIGHTINGS = "specforge.training.losses.weightings"


@hookimpl
def specforge_commands() -> Iterable[Command]:
    """The subcommands of the core."""
    return [
        _command("prepare", "prepare the data that a draft is trained on"),
        _command("estimate", "estimate the memory, time and disk of a run before it starts", "estimate.command:run"),
        _command("serve-verifier", "serve a verifier with vLLM, for its states", "serve_verifier:run"),
        _command("fit", "train a draft", "trainer:fit"),
        _command("validate", "measure a trained draft on the validation data", "trainer:validate"),
        _command("test", "measure a trained draft on the test data", "trainer:test"),
        _command("generate", "answer prompts by speculative decoding with a draft"),
        _command("evaluate", "measure drafts on prompt sets and write a report", "evaluate.command:run"),
        _command("export", "write a draft in the format that a server loads"),
        _command("convert", "import a published draft, to measure or train it"),
        _command("verify", "check an export: its files, with its verifier, or served"),
        _command("doctor", "check this installation: versions, devices, hub"),
        _command("plugins", "list the installed plugins and their faults; create one"),
        _command("completion", "print a completion script for your shell"),
    ]


@hookimpl
def specforge_proposals() -> Iterable[ProposalMethod]:
    """The proposal methods that work with every algorithm."""
    return [
        _proposal("greedy", "Greedy", "a chain of the draft's most probable tokens"),
        _proposal("sampling", "Sampling", "a chain of tokens sampled from the draft's distribution"),
        _proposal("static_tree", "StaticTree", "a tree of a fixed shape"),
        _proposal("dynamic_tree", "DynamicTree", "a tree that grows where the draft is confident"),
        _proposal("prompt_lookup", "PromptLookup", "what followed an earlier occurrence of the last tokens; no draft"),
        _proposal("bigram", "Bigram", "what most often followed the last token in training; no draft"),
    ]


@hookimpl
def specforge_objectives() -> Iterable[Objective]:
    """The training losses of the core."""
    return [
        _objective("kl", "forward Kullback-Leibler divergence KL(p || q)", "forward_kl"),
        _objective("reverse_kl", "reverse Kullback-Leibler divergence KL(q || p)", "reverse_kl"),
        _objective("cross_entropy", "soft cross-entropy of q under p", "cross_entropy"),
        _objective("text", "cross-entropy with the text's own tokens", "text_cross_entropy", uses_text=True),
        _objective("argmax", "cross-entropy with the verifier's most probable token", "argmax_cross_entropy"),
        _objective("total_variation", "rejection probability 1 - sum min(p, q)", "total_variation"),
        _objective("jsd", "Jensen-Shannon divergence", "jensen_shannon"),
        _objective("lk_alpha", "-log of the acceptance probability", "lk_alpha"),
        _objective(
            "lk_lambda",
            "forward KL fading into total variation as acceptance grows",
            "lk_lambda",
            uses_mean_acceptance=True,
        ),
    ]


@hookimpl
def specforge_weightings() -> Iterable[Weighting]:
    """The core's weightings along a chain."""
    return [
        Weighting(
            "dpace",
            "expected number of accepted tokens that depend on a step (D-PACE)",
            function=f"{_WEIGHTINGS}:dpace",
            statistic=f"{_WEIGHTINGS}:confidence",
            uses_text=True,
            closed_form=True,
        ),
        Weighting(
            "vat",
            "1 up to the first rejected step, then decaying (VAT)",
            function=f"{_WEIGHTINGS}:vat",
            statistic=f"{_WEIGHTINGS}:agreement",
            closed_form=True,
        ),
    ]


@hookimpl
def specforge_layer_families() -> Iterable[LayerFamily]:
    """The families of draft layers that engines can run."""
    blocks = "specforge.models.base_components"
    return [
        LayerFamily("llama", "Llama's layers, which every engine supports for drafts", f"{blocks}:LLAMA"),
        LayerFamily("qwen3", "Qwen3's layers, with norms on queries and keys", f"{blocks}:QWEN3"),
    ]


@hookimpl
def specforge_feature_transports() -> Iterable[FeatureTransport]:
    """Ways of vLLM's own connector and of those of hs-connectors."""
    return [
        FeatureTransport("file", "files in a folder shared with the server", f"{_TRANSPORTS}:FileTransport"),
        FeatureTransport("fp8", "the same with one byte per value", f"{_TRANSPORTS}:OneByteFileTransport"),
        FeatureTransport("mooncake", "a Mooncake store, by the extra mooncake", f"{_MOONCAKE}:MooncakeTransport"),
    ]


def _objective(name: str, summary: str, function: str, **reads: bool) -> Objective:
    return Objective(name, summary, f"{_OBJECTIVES}:{function}", closed_form=True, **reads)


def _proposal(name: str, prefix: str, summary: str) -> ProposalMethod:
    where = f"specforge.proposals.{name}:{prefix}"
    return ProposalMethod(name, summary, config=f"{where}TokenProposalConfig", proposer=f"{where}Proposer")


def _command(name: str, summary: str, run: str | None = None) -> Command:
    module, _, function = (run or f"{name}:run").partition(":")
    where = f"specforge.commands.{module}"
    return Command(name, summary, f"{where}:{function}", f"{where}:command_line")
