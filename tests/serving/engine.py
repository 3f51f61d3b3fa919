"""Runs vLLM in a separate process: ``python engine.py REQUEST ANSWER``, both JSON files.

The request names the verifier, prompts as token ids, ``max_tokens``, and under ``engines`` further options of each
engine. The answer has, for each engine, the tokens of every response and the counters of speculative decoding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

COUNTERS = "vllm:spec_decode_num_"


def ask(request: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Let one engine answer all prompts greedily."""
    engine = LLM(
        request["verifier"],
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        max_model_len=512,
        max_num_seqs=8,
        **options,
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    # Whether tokens accepted after an end token are counted differs between engines.
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    before = counters(engine)
    responses = engine.generate(prompts, sampling, use_tqdm=False)
    after = counters(engine)
    return {
        "tokens": [list(response.outputs[0].token_ids) for response in responses],
        "counters": {name: after[name] - before.get(name, 0) for name in after},
    }


def counters(engine: LLM) -> dict[str, int]:
    """Return the current counters of the process."""
    return {
        metric.name.removeprefix(COUNTERS): metric.value
        for metric in engine.get_metrics()
        if metric.name.startswith(COUNTERS) and hasattr(metric, "value")
    }


def run(request: Path, answer: Path) -> None:
    """Let each engine of the request answer it, one after the other."""
    asked = json.loads(request.read_text())
    answers = {name: ask(asked, options) for name, options in asked["engines"].items()}
    answer.write_text(json.dumps(answers))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
