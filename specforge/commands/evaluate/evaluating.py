"""Measuring what the arguments of ``specforge evaluate`` name."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel

from specforge.checkpoints.run_record import find_draft
from specforge.commands.arguments import find_verifier, load, load_draft, sampling_of
from specforge.commands.evaluate.report import check_folder, write_report
from specforge.commands.evaluate.servers import measure_servers, replayed_lengths
from specforge.commands.evaluate.table import print_table
from specforge.config import SpeculatorModelConfig
from specforge.data.module import default_cache
from specforge.data.rows.bigrams import bigram_table
from specforge.data.rows.building import build_rows
from specforge.data.rows.summary import RowSettings
from specforge.data.text.prompts import Conversation, by_category, prompt_set_name, read_prompts
from specforge.data.text.sources import check_source, source_fingerprint
from specforge.data.text.template import ChatTemplate
from specforge.decoding.settings import Verification
from specforge.errors import UsageError
from specforge.evaluation.expecting import expectations
from specforge.evaluation.measuring import Contender, Measuring, Settings
from specforge.evaluation.results import Results
from specforge.hookspecs import ProposalMethod
from specforge.proposals.choice import choose_proposal, describe
from specforge.registry import installed
from specforge.sampling import Sampling


def evaluate(found: Namespace) -> None:
    """Measure, print a table and write a report.

    Args:
        found: The command's arguments.
    """
    check_folder(Path(found.output))
    found.drafts = [find_draft(name)[0] for name in found.drafts]
    sampling, verification = sampling_of(found), Verification(method=found.verification)
    prompt_sets = _prompt_sets(found)
    results = Results(
        verifier="",
        verifier_parameters=None,
        sampling=sampling,
        verification=verification.method,
        max_new_tokens=found.max_new_tokens,
        batch_size=found.batch_size,
        seed=found.seed,
        template_arguments=found.template_arguments or {},
        machine="",
        versions={name: version(name) for name in ("specforge-lightning", "torch", "transformers")},
        prompt_sets=list(prompt_sets),
    )
    measuring = _measuring(found, results, sampling, verification) if found.drafts or not found.endpoint else None
    if found.endpoint:
        results.served = measure_servers(found, sampling, prompt_sets)
    if measuring is not None:
        _measure(measuring, prompt_sets)
        results.contenders = [one.result(verification, measuring.verifier) for one in measuring.contenders]
    if results.served is not None:
        served, replayed = results.served, replayed_lengths(results.contenders)
        served.expectations = expectations(served.servers, served.concurrencies, replayed)
        results.verifier = results.verifier or served.model
    print_table(results, Console())
    write_report(results, Path(found.output))
    print(f"\nDone: {found.output} holds results.json and report.html; open the latter in a browser.")


def _prompt_sets(found: Namespace) -> dict[str, list[Conversation]]:
    """Read the prompt sets, each split by category."""
    names = [prompt_set_name(source) for source in found.prompts]
    if len(set(names)) < len(names):
        raise UsageError(f"--prompts: two prompt sets have the same name: {', '.join(names)}; rename a file")
    prompt_sets: dict[str, list[Conversation]] = {}
    for name, source in zip(names, found.prompts, strict=True):
        prompt_sets |= by_category(name, read_prompts(source, limit=found.limit))
    return prompt_sets


def _measuring(found: Namespace, results: Results, sampling: Sampling, verification: Verification) -> Measuring:
    """Load the verifier and the contenders, and note the verifier in the results."""
    if "bigram" in " ".join(found.baselines) and not found.bigram_rows:
        raise UsageError("the baseline bigram is counted from training rows; give them as --bigram_rows")
    if found.bigram_rows:
        check_source(found.bigram_rows, "--bigram_rows")
    for text in found.baselines:
        _check_baseline(text)
    configs = [SpeculatorModelConfig.from_pretrained(name) for name in found.drafts]
    results.verifier = find_verifier(found, configs)
    verifier, template = load(found, results.verifier)
    results.verifier_parameters = sum(one.numel() for one in verifier.parameters())
    results.machine = _machine(verifier)
    contenders = _contenders(found, configs, verifier, template)
    settings = Settings(sampling, verification, found.max_new_tokens, found.batch_size, found.seed)
    return Measuring(verifier, template, contenders, settings)


def _check_baseline(text: str) -> None:
    name = text.partition(":")[0]
    if installed().load(installed().find(ProposalMethod, name), "proposer").needs_draft:
        raise UsageError(f"--baselines: {name} needs a draft; give it as --proposal")


def _contenders(
    found: Namespace,
    configs: list[SpeculatorModelConfig],
    verifier: PreTrainedModel,
    template: ChatTemplate,
) -> list[Contender]:
    contenders = []
    for path, config in zip(found.drafts, configs, strict=True):
        proposals = [choose_proposal(text, config) for text in found.proposal or [None]]
        draft = load_draft(path, verifier)
        contenders += [Contender(f"{_short(path)} {describe(one)}", one, draft, path) for one in proposals]
    table = _bigram_table(found, verifier, template) if found.bigram_rows else None
    for text in found.baselines:
        proposal = choose_proposal(text, None, **({} if table is None else {"table": str(table)}))
        contenders.append(Contender(describe(proposal), proposal))
    names = [one.name for one in contenders]
    if len(set(names)) < len(names):
        raise UsageError(f"two contenders have the same name: {', '.join(names)}; rename a draft's folder or drop one")
    return contenders


def _bigram_table(found: Namespace, verifier: PreTrainedModel, template: ChatTemplate) -> Path:
    cache = default_cache()
    vocabulary = verifier.config.get_text_config().vocab_size
    rows = build_rows(found.bigram_rows, lambda: template, vocabulary, RowSettings(2048, "truncate"), cache / "rows")
    return bigram_table(rows, f"{source_fingerprint(found.bigram_rows)} {vocabulary}", cache / "bigrams")


def _measure(measuring: Measuring, prompt_sets: dict[str, list[Conversation]]) -> None:
    total = sum(len(one.turns) for conversations in prompt_sets.values() for one in conversations)
    # disable=None shows the bar on a terminal only.
    with tqdm(total=total, unit=" responses", disable=None) as bar:
        for name, conversations in prompt_sets.items():
            bar.set_description(name)
            measuring.run(name, conversations, bar.update)


def _short(path: str) -> str:
    """Return the display name of a draft: its run's name for a run's draft, otherwise the last part of the path."""
    parts = Path(path).parts
    return "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-1] == "draft" else parts[-1]


def _machine(verifier: PreTrainedModel) -> str:
    if verifier.device.type == "cpu":
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    else:
        where = torch.cuda.get_device_name() if verifier.device.type == "cuda" else verifier.device.type
    return f"{where}, verifier in {str(verifier.dtype).removeprefix('torch.')}"
