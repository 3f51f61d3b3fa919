r"""Algorithms side by side: equal data, several seeds, chains and trees, temperature 0 and 1.

    python benchmarks/algorithms.py --verifier configs/quickstart/verifier --train configs/quickstart/train.jsonl \
        --validation configs/quickstart/validation.jsonl --mask-token 3 --steps 520 --seeds 42 1 2 --equal operations

Prints two Markdown tables: what each recipe costs, and its acceptance length on the prompts of the validation rows,
mean and range over the seeds, with the draft's time and operations a round of the greedy chain at temperature 0. With
``--equal operations``, each recipe runs as many steps as cost the operations of EAGLE-3's ``--steps``, without those of
the verifier, whose states can be stored.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specforge import SpeculatorModel
from specforge.__main__ import main as specforge
from specforge.commands.estimate.estimating import EstimateCLI, estimate
from specforge.config import TokenProposalConfig
from specforge.data.text.prompts import read_prompts
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.settings import Verification
from specforge.estimation.shapes import MORE_FORMULAS
from specforge.estimation.step import VERIFIER
from specforge.evaluation.measuring import Contender, Measuring, Settings
from specforge.hookspecs import Algorithm
from specforge.models.drafter import Drafter
from specforge.proposals.choice import choose_proposal
from specforge.registry import installed
from specforge.sampling import Sampling
from specforge.verifier.loading import load_verifier

# The rows are greedy: a greedy round accepts their own tokens.
TEXT = {"objective": {"kl": 1.0, "text": 0.5}}
BLOCKS = {**TEXT, "step_decay": 0.8, "anchors": 64}
HASS = {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0, "text": 0.5}}
EAGLE3 = {**TEXT, "ttt_steps": 5, "step_decay": 0.6}
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
    "P-EAGLE": {
        "algorithm": "peagle",
        "model": {**TEXT, "depths": 5, "draft": {"num_layers": 1, "draft_vocab_size": None}},
    },
    "DFlash": {"algorithm": "dflash", "model": {**BLOCKS, "draft": {"num_layers": 1, "block_size": 6}}},
    "DFlash, 2 layers": {"algorithm": "dflash", "model": {**BLOCKS, "draft": {"num_layers": 2, "block_size": 6}}},
    "DFlash2": {"algorithm": "dflash2", "model": {**BLOCKS, "draft": {"num_layers": 1, "block_size": 6}}},
    "DSpark": {"algorithm": "dspark", "model": {**BLOCKS, "draft": {"num_layers": 1, "block_size": 5}}},
    "DSpark, 2 layers": {"algorithm": "dspark", "model": {**BLOCKS, "draft": {"num_layers": 2, "block_size": 5}}},
    # The verifier's own layers are trained at a lower rate than new ones.
    "draft model, 3 layers": {
        "algorithm": "draft_model",
        "model": {**TEXT, "draft": {"init_layers": [0, 1, 7]}},
        "lr": 5e-3,
    },
}
MASKED = ("peagle", "dflash", "dflash2", "dspark")
METHODS = {
    "greedy": "greedy:speculative_tokens={chain}",
    "sampling": "sampling:speculative_tokens={chain}",
    "dynamic_tree": "dynamic_tree:depth={depth}",
}


@dataclass(frozen=True)
class Cost:
    """What training a recipe costs.

    Attributes:
        weights: Trained weights.
        per_step: Operations of an optimizer step, without the verifier.
        memory: Peak of memory in bytes, as ``specforge estimate`` counts it.
    """

    weights: int
    per_step: float
    memory: int


def configuration(arguments: argparse.Namespace, recipe: str, seed: int, steps: int) -> Path:
    """Write the configuration of a run, and return its file."""
    folder = arguments.output / f"{recipe.replace(', ', '-').replace(' ', '-').lower()}-{seed}-{steps}"
    chosen = RECIPES[recipe]
    model = chosen["model"]
    if chosen["algorithm"] in MASKED:
        model = {**model, "draft": {**model["draft"], "mask_token_id": arguments.mask_token}}
    values = {
        "algorithm": chosen["algorithm"],
        "verifier": arguments.verifier,
        "output_dir": str(folder),
        "seed_everything": seed,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": 1000,
            "val_check_interval": max(1, steps // 4),
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
        },
        "model": {
            **model,
            "optimizer": {"name": arguments.optimizer, "lr": chosen.get("lr", arguments.lr), "weight_decay": 0.1},
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def cost(arguments: argparse.Namespace, recipe: str) -> Cost:
    """Count what a recipe costs."""
    path = configuration(arguments, recipe, 0, arguments.steps)
    algorithm = installed().find(Algorithm, RECIPES[recipe]["algorithm"])
    words = ["--config", str(path), "--tokens", "null", "--device_flops", "1e12"]
    found = estimate(EstimateCLI(algorithm, words, "estimate"))
    per_token = found.total_flops - found.flops[VERIFIER]
    return Cost(found.trained, per_token * found.tokens_per_step, found.memory.peak)


def train(path: Path) -> Path:
    """Train one draft, unless it is there, and return its folder."""
    draft = path.parent / "version_0" / "draft"
    if not draft.exists():
        assert specforge(["fit", "--config", str(path)]) == 0
    return draft


def operations_a_round(draft: SpeculatorModel, prompt: Tensor) -> float:
    """Count the draft's operations in a round of a greedy chain, its head's and those on decided tokens included.

    Args:
        draft: The draft, attached to the verifier.
        prompt: A prompt, int64 [T].
    """
    make, commits, steps = draft.drafter, list[int](), list[int]()

    def counted(function: Callable[..., Any], found: list[int]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counter:
                result = function(*arguments)
            found.append(counter.get_total_flops())
            return result

        return run

    def counted_drafter(batch_size: int) -> Drafter:
        drafter: Any = make(batch_size)
        drafter.commit, drafter.step = counted(drafter.commit, commits), counted(drafter.step, steps)
        return drafter

    draft.requires_grad_(False)  # else the counter waits for a backward pass
    draft.drafter = counted_drafter  # type: ignore[method-assign]
    draft.generate(prompt[None], max_new_tokens=64, proposal=proposal("greedy", draft))
    draft.drafter = make  # type: ignore[method-assign]
    # The first commit reads the prompt.
    return (sum(commits[1:]) + sum(steps)) / len(commits[1:])


def proposal(method: str, draft: SpeculatorModel) -> TokenProposalConfig:
    """Chains of 5 and trees of depth 6, or the draft's maximum."""
    most = draft.drafter(1).max_depth or 6
    return choose_proposal(METHODS[method].format(chain=min(5, most), depth=min(6, most)), None)


def main() -> None:
    """Train and measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("verifier", "train", "validation"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--mask-token", type=int, required=True, help="id that no text holds, for masked slots")
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--equal", choices=["steps", "operations"], default="steps")
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
    costs = {recipe: cost(arguments, recipe) for recipe in arguments.recipes}
    steps = dict.fromkeys(arguments.recipes, arguments.steps)
    if arguments.equal == "operations":
        budget = arguments.steps * cost(arguments, "EAGLE-3").per_step
        steps = {recipe: round(budget / costs[recipe].per_step) for recipe in arguments.recipes}
    print("| algorithm | trained weights | MFLOP a step | steps | peak memory, MB |\n|---|---|---|---|---|")
    for recipe, found in costs.items():
        figures = f"{found.weights:,} | {found.per_step / 1e6:,.0f} | {steps[recipe]:,} | {found.memory / 1e6:.0f}"
        print(f"| {recipe} | {figures} |", flush=True)
    drafts = {
        (recipe, seed): train(configuration(arguments, recipe, seed, steps[recipe]))
        for recipe, seed in itertools.product(arguments.recipes, arguments.seeds)
    }
    if arguments.train_only:
        return
    verifier, template = load_verifier(arguments.verifier), VerifierTokenizer(arguments.verifier).template
    conversations = read_prompts(arguments.validation, limit=arguments.limit)
    columns = [(temperature, method) for temperature in (0.0, 1.0) for method in METHODS]
    columns.remove((0.0, "sampling"))  # the greedy chain again
    prompt = torch.tensor(conversations[0].prompt(0, [], template))
    operations = {
        recipe: operations_a_round(SpeculatorModel.from_pretrained(path, verifier=verifier), prompt)
        for (recipe, _), path in drafts.items()
    }
    lengths: dict[tuple[str, float, str], list[float]] = {}
    times: dict[str, list[float]] = {}
    for temperature, method in columns:
        contenders = []
        for (recipe, seed), path in drafts.items():
            draft = SpeculatorModel.from_pretrained(path, verifier=verifier)
            contenders.append(Contender(f"{recipe}/{seed}", proposal(method, draft), draft))
        contenders.append(Contender("prompt lookup/0", choose_proposal("prompt_lookup", None)))
        settings = Settings(Sampling(temperature=temperature), Verification(), arguments.max_new_tokens, 32, seed=0)
        Measuring(verifier, template, contenders, settings).run("validation", conversations, lambda _: None)
        for contender in contenders:
            recipe, measured = contender.name.split("/")[0], contender.tallies["validation"].measurement("validation")
            lengths.setdefault((recipe, temperature, method), []).append(measured.acceptance_length)
            if (temperature, method) == columns[0]:
                times.setdefault(recipe, []).append(measured.draft_milliseconds)
    heads = [
        *(f"{method}, T = {temperature:g}" for temperature, method in columns),
        "draft ms a round",
        "draft MFLOP a round",
    ]
    print(f"\n| algorithm | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for recipe in [*arguments.recipes, "prompt lookup"]:
        cells = [lengths[recipe, temperature, method] for temperature, method in columns]
        shown = [f"{sum(cell) / len(cell):.3f} ({min(cell):.2f} to {max(cell):.2f})" for cell in cells]
        counted = f"{operations[recipe] / 1e6:.2f}" if recipe in operations else ""
        print(f"| {recipe} | {' | '.join(shown)} | {min(times[recipe]):.2f} | {counted} |")


if __name__ == "__main__":
    main()
