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


@dataclass(frozen=True)
class Draft:
    """A draft that is trained, exported and served.

    Attributes:
        model: Settings of the algorithm.
        format: The export's format.
        speculative: vLLM's settings besides the draft's folder and the number of tokens.
        interpreted: Whether vLLM's CPU build needs ``interpreted_engine.py`` for it.
        steps: Optimizer steps.
    """

    model: dict[str, Any]
    format: str
    speculative: dict[str, Any]
    interpreted: bool = False
    steps: int = 200


# A token that no text of the quickstart holds.
MASK = {"mask_token_id": 3}
BLOCK: dict[str, Any] = {"anchors": 64, "step_decay": 0.8, "objective": {"kl": 1.0, "text": 0.5}}
# Blocks are trained as long as they are served: a server that drafts fewer tokens runs another network.
DRAFTS = {
    "eagle3": Draft({"ttt_steps": DRAFTED, "draft": {"draft_vocab_size": 512}}, "vllm", {"method": "eagle3"}),
    "eagle": Draft({}, "vllm", {"method": "eagle"}),
    "mlp": Draft(
        {"draft": {"num_layers": DRAFTED, "intermediate_size": 128}},
        "mlp_speculator",
        {"method": "custom_class", "model": "specforge_mlp.vllm.MLPProposer"},
    ),
    "peagle": Draft(
        {"depths": DRAFTED, "draft": {"num_layers": 2, "draft_vocab_size": 512, **MASK}},
        "speculators",
        {"method": "eagle3", "parallel_drafting": True},
    ),
    "dflash": Draft(
        {**BLOCK, "draft": {"num_layers": 1, "block_size": DRAFTED + 1, **MASK}},
        "vllm",
        {"method": "dflash"},
        steps=500,
    ),
    "dflash2": Draft(
        {**BLOCK, "draft": {"num_layers": 2, "block_size": DRAFTED + 1, **MASK}},
        "vllm",
        {"method": "dflash"},
        interpreted=True,
    ),
    "dspark": Draft(
        {**BLOCK, "draft": {"num_layers": 2, "block_size": DRAFTED, **MASK}},
        "vllm",
        {"method": "dspark"},
        interpreted=True,
    ),
    "draft_model": Draft(
        {
            "draft": {"init_layers": [0, 7]},
            "measured_steps": DRAFTED,
            "optimizer": {"name": "muon", "lr": 5e-3},
        },
        "transformers",
        {"method": "draft_model"},
    ),
}


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


def engine_options(name: str, export: Path) -> dict[str, Any]:
    """Return an engine's settings for drafting with an export."""
    speculative = {"model": str(export), "num_speculative_tokens": DRAFTED, **DRAFTS[name].speculative}
    # The method custom_class takes a class instead of a folder.
    additional = {"additional_config": {"mlp_speculator": str(export)}} if name == "mlp" else {}
    return {"speculative_config": speculative, **additional}


def ask_vllm(served: Served, engines: dict[str, dict[str, Any]], folder: Path, script: str, number: int) -> Any:
    """Let engines answer the first prompts.

    Args:
        served: Verifier and prompts.
        engines: Settings of each.
        folder: For the request and the answer.
        script: ``engine.py``, or one that runs it.
        number: Number of prompts.

    Returns:
        What the script writes.
    """
    request, answer = folder / "request.json", folder / "answer.json"
    prompts = served.prompts[:number]
    values = {"verifier": str(served.verifier), "prompts": prompts, "max_tokens": MAX_TOKENS, "engines": engines}
    request.write_text(json.dumps(values))
    command = [sys.executable, str(Path(__file__).with_name(script)), str(request), str(answer)]
    subprocess.run(command, env={**os.environ, **ENGINE_ENVIRONMENT}, check=True)
    return json.loads(answer.read_text())


def fit(algorithm: str, verifier: Path, root: Path, draft: Draft, **more: Any) -> Path:
    """Train a draft, with further values of its configuration, and return the folder of the run."""
    values = {
        "algorithm": algorithm,
        "verifier": str(verifier),
        **more,
        "output_dir": str(root / algorithm),
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": draft.steps,
            "max_epochs": -1,
            "val_check_interval": draft.steps,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 0.5,
            "limit_val_batches": 10,
            "logger": False,
        },
        "model": {
            "optimizer": {"name": "muon", "lr": 2e-2},
            "schedule": {"name": "cosine", "warmup": 0.03},
            **draft.model,
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
