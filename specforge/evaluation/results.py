"""What an evaluation finds out, as plain data: stored as JSON, shown as a table and as a page.

Words are vLLM's where it has one: *drafts* are rounds in which tokens were proposed and verified, *draft tokens* the
proposed tokens, *accepted tokens* those that the verifier accepted. Acceptance length is tokens a round, the verifier's
own included: 1 + accepted tokens / drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from specforge.sampling import Sampling


class Result(BaseModel):
    """Base of all parts of the results."""

    model_config = ConfigDict(extra="forbid")


class Stretch(Result):
    """Rounds that began within a stretch of the response.

    Attributes:
        begin: First token of the stretch, counted from the response's begin.
        end: The token behind its last one.
        drafts: Rounds that began there.
        acceptance_length: Tokens a round.
    """

    begin: int
    end: int
    drafts: int
    acceptance_length: float


class Measurement(Result):
    """One contender on one prompt set, or on all of them.

    Attributes:
        prompt_set: Name of the prompt set; ``"all"`` for all of them.
        responses: Responses, one a turn.
        tokens: Tokens of the responses.
        acceptance_length: Tokens a round.
        confidence_interval: Of the acceptance length, 95 %, by resampling prompts; None for fewer than two prompts.
        accept_rate_pos: Share of the drafts that accepted at least k = 1, 2, ... tokens.
        accept_rate_cond: Of those that accepted at least k - 1.
        histogram: Drafts by number of accepted tokens, 0, 1, ...
        num_drafts: Rounds.
        num_draft_tokens: Proposed tokens.
        num_accepted_tokens: Accepted tokens.
        draft_acceptance_rate: Accepted tokens of the proposed ones.
        draft_milliseconds: The draft's time, a round.
        verifier_milliseconds: The verifier's time, a round.
        other_milliseconds: What the loop itself took, a round.
        tokens_per_second: With speculation, prompts' passes left out.
        tokens_per_second_alone: The verifier alone on the same prompts, measured in turn in the same run.
        speedup: The one over the other.
        identical_responses: Responses that are token for token the verifier's alone; None above temperature 0.
        by_stretch: Acceptance length by where in the response a round begins.
        by_chain_length: What the acceptance length would be with chains of K = 1, 2, ... tokens, by replay on the
            verifier's own responses; empty where that is not known.
        compared_rounds: Rounds that were compared with a replay of the same text; 0 where it does not determine them.
        differing_rounds: How many of them accept other tokens than the replay: the draft's drafter is wrong.
        difference: That in words, with an example; empty if none differs.
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
    by_stretch: list[Stretch]
    by_chain_length: list[float]
    compared_rounds: int = 0
    differing_rounds: int = 0
    difference: str = ""


class ContenderResult(Result):
    """What one contender came to.

    Attributes:
        name: For people, unique within the results.
        draft: Folder or hub id of the draft; None for a method that needs none.
        proposal: Settings of the proposal method.
        is_baseline: Whether it is a method without a draft, which a draft has to beat.
        is_lossy: Whether its output may differ from the verifier's own.
        sets: By prompt set, in the order of ``Results.prompt_sets``.
        all_sets: All prompt sets together.
    """

    name: str
    draft: str | None
    proposal: dict[str, Any]
    is_baseline: bool
    is_lossy: bool
    sets: list[Measurement]
    all_sets: Measurement


class Results(Result):
    """A whole evaluation.

    Attributes:
        verifier: Folder or hub id.
        verifier_parameters: Number of its weights.
        sampling: How tokens were chosen.
        verification: Name of the verification method.
        max_new_tokens: Most tokens of a response.
        batch_size: Responses decoded side by side.
        seed: Seed of everything random.
        template_arguments: What the chat template was given besides the chats.
        machine: Device, threads and types, for people.
        versions: Version of each package that matters.
        prompt_sets: Names of the prompt sets.
        contenders: In the order in which they were given.
    """

    verifier: str
    verifier_parameters: int
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
