"""Drafts that are trained and exported for serving, and an engine to serve them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from wide_verifier import QUICKSTART

from specforge.__main__ import main

DRAFTED = 3
MAX_TOKENS = 64
# vLLM on a CPU: one process, one thread, little memory, no compiled kernels.
ENGINE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
MODELS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3, "draft": {"draft_vocab_size": 512}},
    "eagle": {},
    "mlp": {"draft": {"num_layers": DRAFTED, "intermediate_size": 128}},
}
FORMATS = {"eagle3": "vllm", "eagle": "vllm", "mlp": "mlp_speculator"}


@dataclass(frozen=True)
class Served:
    """A verifier, and drafts for it.

    Attributes:
        verifier: Its folder.
        runs: The run of each algorithm.
        exports: The export of each.
        prompts: Token ids of some prompts.
    """

    verifier: Path
    runs: dict[str, Path]
    exports: dict[str, Path]
    prompts: list[list[int]]


def speculation(model: str, method: str) -> dict[str, Any]:
    """Return an engine's settings for drafting with a model."""
    return {"speculative_config": {"model": model, "method": method, "num_speculative_tokens": DRAFTED}}


def ask_vllm(served: Served, engines: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run ``engine.py``."""
    request, answer = folder / "request.json", folder / "answer.json"
    values = {"verifier": str(served.verifier), "prompts": served.prompts, "max_tokens": MAX_TOKENS, "engines": engines}
    request.write_text(json.dumps(values))
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(request), str(answer)]
    subprocess.run(command, env={**os.environ, **ENGINE_ENVIRONMENT}, check=True)
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def fit(algorithm: str, verifier: Path, root: Path) -> Path:
    values = {
        "algorithm": algorithm,
        "verifier": str(verifier),
        "output_dir": str(root / algorithm),
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 200,
            "max_epochs": -1,
            "val_check_interval": 200,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 0.5,
            "limit_val_batches": 10,
            "logger": False,
        },
        "model": {
            **MODELS[algorithm],
            "optimizer": {"name": "muon", "lr": 2e-2},
            "schedule": {"name": "cosine", "warmup": 0.03},
        },
        "data": {
            "train": str(QUICKSTART / "train.jsonl"),
            "validation": str(QUICKSTART / "validation.jsonl"),
            "max_length": 512,
            "cache_dir": str(root / "cache"),
        },
    }
    config = root / f"{algorithm}.yaml"
    config.write_text(yaml.safe_dump(values))
    torch.set_num_threads(1)
    assert main(["fit", "--config", str(config)]) == 0
    return root / algorithm / "version_0"
