"""Expected speedups of a served draft, against measured ones at numbers of drafted tokens that the expectation ignores.

    .venv-serving/bin/python benchmarks/expected_speed.py VERIFIER EXPORT --prompts ROWS

(tests/serving/install creates the environment.) vLLM engines without a draft and with several numbers of drafted tokens
run in this process and take turns, batch by batch. The time of a round is the CPU time of a step with full load, of
all such steps the 20th percentile: what other programs do to a shared machine lengthens most steps, but not those.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specforge.evaluation.expecting import expectations
from specforge.evaluation.served import Expectation, Percentiles, ServedMeasurement, ServerResult

# One process and one thread for all engines.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
UNDISTURBED = 0.2
NO_TIMES = Percentiles(p50=0, p90=0, p99=0)


@dataclass
class Counted:
    """What one engine did at one load."""

    steps: list[float] = field(default_factory=list)
    responses: int = 0
    tokens: int = 0
    rounds: int = 0

    def measurement(self, load: int, drafted: int) -> ServedMeasurement:
        """Return it as a server's measurement, whose rounds take the time of an undisturbed step."""
        sent = (self.tokens - self.responses) / self.rounds
        return ServedMeasurement(
            prompt_set="all",
            concurrency=load,
            responses=self.responses,
            tokens=self.tokens,
            seconds=sum(self.steps),
            tokens_per_second=load * sent / self.step,
            request_tokens_per_second=sent / self.step,
            first_token=NO_TIMES,
            per_token=NO_TIMES,
            whole=NO_TIMES,
            acceptance_length=sent if drafted else None,
            num_drafts=self.rounds if drafted else None,
        )

    @property
    def step(self) -> float:
        """Seconds of an undisturbed step."""
        return float(np.quantile(self.steps, UNDISTURBED))


class Engines:
    """Engines that draft K tokens, by K; K = 0 is the verifier alone."""

    def __init__(self, found: argparse.Namespace) -> None:
        from vllm import LLM

        def engine(drafted: int) -> Any:
            speculative = {"model": found.export, "method": found.method, "num_speculative_tokens": drafted}
            return LLM(
                found.verifier,
                dtype=found.dtype,
                enforce_eager=True,
                max_model_len=512,
                max_num_seqs=max(found.loads),
                enable_prefix_caching=False,
                distributed_executor_backend="uni",
                speculative_config=speculative if drafted else None,
            ).llm_engine

        self.length = found.max_new_tokens
        self.engines = {drafted: engine(drafted) for drafted in (0, *found.widths)}
        self.counted: dict[tuple[int, int], Counted] = defaultdict(Counted)

    def answer(self, drafted: int, prompts: list[list[int]]) -> Counted:
        """Answer prompts at the same time; return what was done."""
        from vllm import SamplingParams

        engine, found = self.engines[drafted], Counted(responses=len(prompts))
        for number, tokens in enumerate(prompts):
            sampling = SamplingParams(temperature=0, max_tokens=self.length)
            engine.add_request(str(number), {"prompt_token_ids": tokens}, sampling)
        is_prefill = True
        while engine.has_unfinished_requests():
            begin = time.thread_time()
            answers = engine.step()
            seconds = time.thread_time() - begin
            found.tokens += sum(len(one.outputs[0].token_ids) for one in answers if one.finished)
            if not is_prefill:
                found.rounds += len(answers)
                found.steps += [seconds] if len(answers) == len(prompts) else []
            is_prefill = False
        return found

    def measure(self, prompts: list[list[int]]) -> None:
        """Let all engines answer the same prompts, as many at a time as there are."""
        for drafted in self.engines:
            found, pooled = self.answer(drafted, prompts), self.counted[len(prompts), drafted]
            for name, value in vars(found).items():
                setattr(pooled, name, getattr(pooled, name) + value)

    def servers(self, load: int) -> dict[int, ServerResult]:
        """Return the engines as measured servers."""
        return {
            drafted: ServerResult(
                url="",
                engine="vLLM",
                is_baseline=not drafted,
                draft_tokens=drafted or None,
                measurements=[self.counted[load, drafted].measurement(load, drafted)],
            )
            for drafted in self.engines
        }


def show(load: int, servers: dict[int, ServerResult], fits: list[list[int]]) -> None:
    """Print a row of measured figures, and one for each choice of measured numbers of tokens."""
    measured = {drafted: one.measurements[0] for drafted, one in servers.items()}
    for drafted, one in measured.items():
        times = f"{one.round_milliseconds:.2f} ms, {one.tokens_per_round:.3f} tokens a round"
        print(f"{load} at a time, K = {drafted}: {times}")
    plain = measured[0].request_tokens_per_second
    speedups = {drafted: one.request_tokens_per_second / plain for drafted, one in measured.items() if drafted}
    print("  measured", *(f"K = {drafted}: {value:.2f}" for drafted, value in speedups.items()))
    # Acceptance at each K is known exactly by replay; here, by the engines themselves.
    longest = max(servers)
    lengths = np.interp(range(1, longest + 1), list(measured), [one.tokens_per_round for one in measured.values()])
    for fit in fits:
        chosen = [servers[drafted] for drafted in (*fit, 0)]
        found: Expectation = expectations(chosen, [load], lengths.tolist())[0]
        shown = (f"K = {one.draft_tokens}: {one.speedup:.2f}" for one in found.lengths if one.draft_tokens in speedups)
        print(f"  from {fit}: {found.fixed_milliseconds:.2f} + {found.token_milliseconds:.2f} K ms;", *shown)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier")
    parser.add_argument("export")
    parser.add_argument("--prompts", type=Path, required=True, help="rows with input_ids and loss_mask")
    parser.add_argument("--method", default="eagle3")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batches", type=int, default=12, help="at each load")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    found = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    lines = found.prompts.read_text(encoding="utf-8").splitlines()[: found.batches * max(found.loads)]
    rows = [json.loads(line) for line in lines]
    prompts = [row["input_ids"][: row["loss_mask"].index(1)] for row in rows]
    engines = Engines(found)
    for drafted in engines.engines:
        engines.answer(drafted, prompts[: max(found.loads)])
    for batch in range(found.batches):
        for load in found.loads:
            engines.measure(prompts[batch * load : (batch + 1) * load])
    for load in found.loads:
        show(load, engines.servers(load), [[one] for one in found.widths] + [[found.widths[0], found.widths[-1]]])


if __name__ == "__main__":
    main()
