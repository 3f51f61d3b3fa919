r"""Algorithms side by side: equal data and steps, several seeds, chains and trees, temperature 0 and 1.

    python benchmarks/algorithms.py --verifier configs/quickstart/verifier --train configs/quickstart/train.jsonl \
        --validation configs/quickstart/validation.jsonl --steps 520 --seeds 1 2 3

Prints a Markdown table of acceptance lengths on the validation rows' prompts: mean over seeds, and their range.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
import yaml

from specforge import SpeculatorModel
from specforge.__main__ import main as specforge
from specforge.config import TokenProposalConfig
from specforge.data.text.prompts import read_prompts
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.verification import Verification
from specforge.evaluation.measuring import Contender, Measuring, Settings
from specforge.proposals.choice import choose_proposal
from specforge.sampling import Sampling
from specforge.verifier.loading import load_verifier

# The rows are greedy: a greedy round accepts their own tokens.
HASS = {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0, "text": 0.5}}
EAGLE3 = {"ttt_steps": 5, "step_decay": 0.6, "objective": {"kl": 1.0, "text": 0.5}}
STAGE_TWO = {"begin": 0.7, "prompt_length": 32, "new_tokens": 64}
RECIPES: dict[str, dict[str, Any]] = {
    "EAGLE-1": {"algorithm": "eagle", "model": {}},
    "HASS": {"algorithm": "eagle", "model": HASS},
    "EAGLE-3": {"algorithm": "eagle3", "model": {**EAGLE3, "draft": {"draft_vocab_size": None}}},
    "EAGLE-3, for vLLM only": {
        "algorithm": "eagle3",
        "model": {**EAGLE3, "draft": {"draft_vocab_size": None, "layer_type": "qwen3", "norm_output": True}},
    },
    **{
        f"MLP, {heads} heads, {stages}": {
            "algorithm": "mlp",
            "model": {"draft": {"num_layers": heads, "intermediate_size": 256}, "stage_two": stage_two},
        }
        for heads in (3, 5)
        for stages, stage_two in (("stage 1", None), ("both stages", STAGE_TWO))
    },
    # Best with --lr 5e-3.
    "draft model, 3 layers": {
        "algorithm": "draft_model",
        "model": {"draft": {"init_layers": [0, 1, 7]}, "objective": {"kl": 1.0, "text": 0.5}},
    },
}
METHODS = {
    "greedy": "greedy:speculative_tokens={chain}",
    "sampling": "sampling:speculative_tokens={chain}",
    "dynamic_tree": "dynamic_tree:depth={depth}",
}


def train(arguments: argparse.Namespace, recipe: str, seed: int) -> Path:
    """Train a draft unless it exists; return its folder."""
    folder = arguments.output / f"{recipe.replace(', ', '-').replace(' ', '-').lower()}-{seed}"
    chosen = RECIPES[recipe]
    values = {
        "algorithm": chosen["algorithm"],
        "verifier": arguments.verifier,
        "output_dir": str(folder),
        "seed_everything": seed,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": arguments.steps,
            "max_epochs": 1000,
            "val_check_interval": max(1, arguments.steps // 4),
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
        },
        "model": {
            **chosen["model"],
            "optimizer": {"name": arguments.optimizer, "lr": arguments.lr, "weight_decay": 0.1},
            "schedule": {"name": "linear", "warmup": 0.03},
        },
        "data": {
            "train": arguments.train,
            "validation": arguments.validation,
            "max_length": arguments.max_length,
            "batch_size": 1,
            "seed": seed,
        },
    }
    draft = folder / "version_0" / "draft"
    if not draft.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        assert specforge(["fit", "--config", str(folder / "run.yaml")]) == 0
    return draft


def proposal(method: str, draft: SpeculatorModel) -> TokenProposalConfig:
    """Chains of 5 and trees of depth 6, or the draft's maximum."""
    most = draft.drafter(1).max_depth or 6
    return choose_proposal(METHODS[method].format(chain=min(5, most), depth=min(6, most)), None)


def main() -> None:
    """Train and measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("verifier", "train", "validation"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--lr", type=float, default=1.4e-2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--train-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    drafts = {pair: train(arguments, *pair) for pair in itertools.product(arguments.recipes, arguments.seeds)}
    if arguments.train_only:
        return
    verifier, template = load_verifier(arguments.verifier), VerifierTokenizer(arguments.verifier).template
    conversations = read_prompts(arguments.validation, limit=arguments.limit)
    columns = [(temperature, method) for temperature in (0.0, 1.0) for method in METHODS]
    columns.remove((0.0, "sampling"))  # the greedy chain again
    lengths: dict[tuple[str, float, str], list[float]] = {}
    for temperature, method in columns:
        contenders = []
        for (recipe, seed), path in drafts.items():
            draft = SpeculatorModel.from_pretrained(path, verifier=verifier)
            contenders.append(Contender(f"{recipe}/{seed}", proposal(method, draft), draft))
        contenders.append(Contender("prompt lookup/0", choose_proposal("prompt_lookup", None)))
        settings = Settings(Sampling(temperature=temperature), Verification(), arguments.max_new_tokens, 32, seed=0)
        Measuring(verifier, template, contenders, settings).run("validation", conversations, lambda _: None)
        for contender in contenders:
            length = contender.tallies["validation"].measurement("validation").acceptance_length
            lengths.setdefault((contender.name.split("/")[0], temperature, method), []).append(length)
    heads = [f"{method}, T = {temperature:g}" for temperature, method in columns]
    print(f"| algorithm | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for recipe in [*arguments.recipes, "prompt lookup"]:
        cells = [lengths[recipe, temperature, method] for temperature, method in columns]
        shown = [f"{sum(cell) / len(cell):.3f} ({min(cell):.2f} to {max(cell):.2f})" for cell in cells]
        print(f"| {recipe} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
