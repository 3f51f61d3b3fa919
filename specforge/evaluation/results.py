"""The results of an evaluation as plain data: stored as JSON, printed as a table and shown as a page.

Terms are vLLM's if it has one: *drafts* are rounds in which tokens were proposed and verified, *draft tokens* the
proposed tokens, *accepted tokens* those that the verifier accepted. Acceptance length is tokens per round, the
verifier's own included: 1 + accepted tokens / drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from specforge.evaluation.result import Result
from specforge.evaluation.served import Served
from specforge.sampling import Sampling


class Span(Result):
    """Rounds that began within a span of the response.

    Attributes:
        begin: Index of the span's first token within the response.
        end: Index after its last token.
        drafts: Number of rounds that began there.
        acceptance_length: Tokens per round.
    """

    begin: int
    end: int
    drafts: int
    acceptance_length: float


class Measurement(Result):
    """One contender on one prompt set, or on all of them.

    Attributes:
        prompt_set: Name of the prompt set; ``"all"`` for all of them.
        responses: Number of responses, one per turn.
        tokens: Number of tokens of the responses.
        acceptance_length: Tokens per round.
        confidence_interval: 95 % interval of the acceptance length, by resampling prompts; None for fewer than two
            prompts.
        accept_rate_pos: Share of the drafts that accepted at least k = 1, 2, ... tokens.
        accept_rate_cond: The same share among the drafts that accepted at least k - 1.
        histogram: Number of drafts by number of accepted tokens, 0, 1, ...
        num_drafts: Number of rounds.
        num_draft_tokens: Number of proposed tokens.
        num_accepted_tokens: Number of accepted tokens.
        draft_acceptance_rate: Share of the proposed tokens that were accepted.
        draft_milliseconds: The draft's time per round.
        verifier_milliseconds: The verifier's time per round.
        other_milliseconds: The time of the loop itself per round.
        tokens_per_second: With speculation, without the prefill.
        tokens_per_second_alone: Without speculation on the same prompts, measured alternately in the same run.
        speedup: ``tokens_per_second / tokens_per_second_alone``.
        identical_responses: Number of responses identical to those without speculation; None above temperature 0.
        by_stretch: Acceptance length by the position in the response at which a round begins.
        by_chain_length: Acceptance length with chains of K = 1, 2, ... tokens, by replay on the verifier's own
            responses; empty if unknown.
        compared_rounds: Number of rounds compared with a replay of the same text; 0 if the text does not determine
            them.
        differing_rounds: Number of rounds that accept different tokens than the replay: the drafter is wrong.
        difference: Description of the difference, with an example; empty if none differs.
    """

    prompt_set: str
    responses: int
    tokens: int
    acceptance_length: float
    confidence_interval: tuple[float, float] | None
    accept_rate_pos: list[float]
    accept_rate_cond: list[float]
    histogram: list[int]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    draft_acceptance_rate: float
    draft_milliseconds: float
    verifier_milliseconds: float
    other_milliseconds: float
    tokens_per_second: float
    tokens_per_second_alone: float
    speedup: float
    identical_responses: int | None
    by_stretch: list[Span]
    by_chain_length: list[float]
    compared_rounds: int = 0
    differing_rounds: int = 0
    difference: str = ""


class ContenderResult(Result):
    """Results of one contender.

    Attributes:
        name: Display name, unique within the results.
        draft: Folder or hub id of the draft; None for a method that needs none.
        proposal: Settings of the proposal method.
        is_baseline: Whether it is a method without a draft, which a draft has to beat.
        is_lossy: Whether its output may differ from the verifier's own.
        draft_cost: Weights that a pass of the draft reads, relative to the verifier's in bytes; 0 without a draft, None
            if it is not known what a pass of the verifier reads.
        modelled_speedups: Speedup with chains of K = 1, 2, ... tokens if passes take time in proportion to the bytes
            that they read; empty if unknown.
        sets: By prompt set, in the order of ``Results.prompt_sets``.
        all_sets: All prompt sets together.
    """

    name: str
    draft: str | None
    proposal: dict[str, Any]
    is_baseline: bool
    is_lossy: bool
    draft_cost: float | None = None
    modelled_speedups: list[float] = Field(default_factory=list)
    sets: list[Measurement]
    all_sets: Measurement


class Results(Result):
    """Results of a whole evaluation.

    Attributes:
        verifier: Folder or hub id, or the servers' name for it.
        verifier_parameters: Number of its weights; None if only servers were measured.
        sampling: How tokens were chosen.
        verification: Name of the verification method.
        max_new_tokens: Maximum number of tokens of a response.
        batch_size: Number of responses decoded in a batch.
        seed: Seed of all randomness.
        template_arguments: Further arguments of the chat template.
        machine: Description of device, threads and dtypes.
        versions: Version of each relevant package.
        prompt_sets: Names of the prompt sets.
        contenders: Results of the contenders, in the given order.
        served: Results of serving engines; None if none was measured.
    """

    verifier: str
    verifier_parameters: int | None
    sampling: Sampling
    verification: str
    max_new_tokens: int
    batch_size: int
    seed: int
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    machine: str
    versions: dict[str, str]
    prompt_sets: list[str]
    contenders: list[ContenderResult] = Field(default_factory=list)
    served: Served | None = None

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read stored results."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def beaten_by_baselines(self) -> dict[str, str]:
        """Return, for each draft that a baseline equals or beats over all prompt sets, the name of the best one."""
        baselines = [one for one in self.contenders if one.is_baseline]
        if not baselines:
            return {}
        best = max(baselines, key=lambda one: one.all_sets.acceptance_length)
        return {
            one.name: best.name
            for one in self.contenders
            if not one.is_baseline and one.all_sets.acceptance_length <= best.all_sets.acceptance_length
        }
