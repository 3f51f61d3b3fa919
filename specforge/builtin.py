"""What the core itself contributes, by the same hooks as any plugin."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Command, Objective, ProposalMethod, hookimpl

_OBJECTIVES = "specforge.training.objectives"


@hookimpl
def specforge_commands() -> Iterable[Command]:
    """The subcommands of the core."""
    return [
        Command("fit", "train a draft", "specforge.commands.trainer:fit"),
        Command("validate", "measure a trained draft on the validation data", "specforge.commands.trainer:validate"),
        Command("test", "measure a trained draft on the test data", "specforge.commands.trainer:test"),
        Command("plugins", "list the installed plugins and their faults", "specforge.commands.plugins:run"),
    ]


@hookimpl
def specforge_proposals() -> Iterable[ProposalMethod]:
    """The proposal methods that serve every algorithm."""
    return [
        ProposalMethod(
            "greedy", "a chain of the draft's most probable tokens", "specforge.proposals:GreedyTokenProposalConfig"
        )
    ]


@hookimpl
def specforge_objectives() -> Iterable[Objective]:
    """The training losses of the core."""
    return [
        Objective("kl", "forward Kullback-Leibler divergence KL(p || q)", f"{_OBJECTIVES}:forward_kl"),
        Objective("reverse_kl", "reverse Kullback-Leibler divergence KL(q || p)", f"{_OBJECTIVES}:reverse_kl"),
        Objective("cross_entropy", "soft cross-entropy of q under p", f"{_OBJECTIVES}:cross_entropy"),
        Objective("total_variation", "rejection probability 1 - sum min(p, q)", f"{_OBJECTIVES}:total_variation"),
        Objective("jsd", "Jensen-Shannon divergence", f"{_OBJECTIVES}:jensen_shannon"),
        Objective("lk_alpha", "-log of the acceptance probability", f"{_OBJECTIVES}:lk_alpha"),
        Objective(
            "lk_lambda",
            "forward KL fading into total variation as acceptance grows",
            f"{_OBJECTIVES}:lk_lambda",
            uses_mean_acceptance=True,
        ),
    ]
