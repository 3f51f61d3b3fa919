r"""What only a GPU can show: that training is right there, how long a step takes, and what the decoding loop costs.

    python benchmarks/gpu_check.py --output gpu.json                    # meant for less than ten minutes
    python benchmarks/gpu_check.py algorithms --algorithms eagle3      # some of the parts
    python benchmarks/gpu_check.py --device cpu --small                 # every part once, before a GPU is paid for

Needs a CUDA build of torch from 2.11, which brings Triton, and the other requirements of pyproject.toml; nothing is
downloaded. A check that fails is printed with what was expected, the others still run, and the exit status is 1.

`kernels` compares the kernels of the loss with float64. `algorithms` trains each algorithm for two steps on the
quickstart's verifier, and compares the losses with those of a CPU, also in bf16-mixed, compiled and with fsdp2.
`steps` times a step of EAGLE-3 with the sizes of Llama-3.1-8B, on stored states and with the verifier, beside the
simulated time if --simulated names a JSON file, {"stored 8192": SECONDS, ...}. `decoding` times the parts of a round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
UNUSED = 3  # no text of the quickstart holds it
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {"ttt_steps": 3, "draft": {"draft_vocab_size": 256}}),
    "eagle": ("eagle", {"noise": 0.0}),
    "hass": ("eagle", {"noise": 0.0, "alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}}),
    "mlp": ("mlp", {"stage_two": None}),
    "dflash": ("dflash", {"anchors": 4, "draft": {"num_layers": 2, "mask_token_id": UNUSED}}),
    "dflash2": ("dflash2", {"anchors": 4, "draft": {"num_layers": 1, "selector_rank": 16, "mask_token_id": UNUSED}}),
    "dspark": ("dspark", {"anchors": 4, "draft": {"num_layers": 1, "mask_token_id": UNUSED}}),
    "peagle": (
        "peagle",
        {
            **{"depths": 3, "down_sample_ratio": 1.0},
            "draft": {"num_layers": 1, "draft_vocab_size": 256, "mask_token_id": UNUSED},
        },
    ),
    "draft_model": ("draft_model", {"draft": {"init_layers": [0, 7]}}),
}
OBJECTIVES = (
    *("kl", "reverse_kl", "cross_entropy", "total_variation", "jsd", "lk_alpha", "lk_lambda", "text", "argmax"),
    "top_k",
)
LLAMA = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0},
}
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096},
}
DOCUMENT, SUPERVISED, ROUNDS = 512, 0.3, 5
SMALL_DOCUMENT = 64
PEAK = 790e12
"""Operations per second of products in bfloat16 that an H200 reaches."""


@dataclass
class Check:
    """The settings of a run, and what it found.

    Attributes:
        device: The device's type.
        small: Whether sizes are small, to try the parts.
        folder: Folder for runs.
        simulated: Simulated seconds of a step, by states and tokens.
        algorithms: Names of those to train.
        figures: Every figure, by its name.
        failures: Checks that failed.
    """

    device: str
    small: bool
    folder: Path
    simulated: dict[str, float]
    algorithms: list[str]
    figures: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def near(self, what: str, found: float, expected: float, tolerance: float) -> None:
        """Record whether a value is near the expected one, relative to it."""
        self.figures[what] = found
        error = abs(found - expected) / max(abs(expected), 1e-12)
        if fine := error <= tolerance:
            print(f"  {what}: {found:.6g}, {error:.1e} from {expected:.6g}", flush=True)
        if not fine:
            self.failed(f"{what}: {found:.6g}, expected {expected:.6g} within {tolerance:.0e}")

    def failed(self, what: str) -> None:
        """Record a failure."""
        self.failures.append(what)
        print(f"  FAILED {what}", flush=True)


def kernels(check: Check) -> None:
    """Compare the sums and gradients of the loss's kernels with float64."""
    if check.device == "cpu" and "TRITON_INTERPRET" not in os.environ:
        print("  not run: on a CPU, set TRITON_INTERPRET=1")
        return
    verifier_size, draft_size = (500, 150) if check.small else (128256, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        for draft in (draft_size, verifier_size):
            for name in OBJECTIVES:
                values, gradient = _kernel_errors(name, dtype, verifier_size, draft, check.device)
                what = f"{name}, {str(dtype).removeprefix('torch.')}, {draft:,} draft tokens"
                if values > 2e-5 or gradient > (2e-5 if dtype == torch.float32 else 2**-7):
                    check.failed(f"{what}: values {values:.1e}, gradient {gradient:.1e} from float64")
                check.figures[f"{what}: gradient"] = gradient
        print(f"  {dtype}: {len(OBJECTIVES)} losses, pruned and full", flush=True)


def _kernel_errors(name: str, dtype: torch.dtype, vocabulary: int, draft: int, device: str) -> tuple[float, float]:
    """Return the largest relative errors of a loss's values and gradient."""
    from specforge.training.losses.comparison import weighted
    from specforge.training.losses.fused import FusedPairs
    from specforge.training.losses.named import objective_terms
    from specforge.training.losses.objectives import Distributions
    from specforge.training.losses.targets import FusedTarget

    generator = torch.Generator(device).manual_seed(0)
    pairs, targets = 6, 3

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    logits, verifier = (3 * drawn(pairs, draft)).to(dtype), (3 * drawn(targets, vocabulary)).to(dtype)
    ids = (
        None
        if draft == vocabulary
        else torch.randperm(vocabulary, generator=generator, device=device)[:draft].sort().values
    )
    target_of = torch.randint(targets, (pairs,), generator=generator, device=device)
    text = torch.randint(-1, draft, (pairs,), generator=generator, device=device)
    mean = weights = torch.rand(pairs, generator=generator, device=device)
    terms = objective_terms({name: 1.0})
    own = logits.clone()
    fused = FusedPairs(own, FusedTarget.of(verifier, ids, None), target_of, text, mean)
    loss, values = weighted(terms, fused.sums, weights)
    fused.differentiate(loss)
    leaf = logits.double().requires_grad_()
    full = verifier.double().log_softmax(-1)[:, slice(None) if ids is None else ids]
    rows = Distributions(leaf.log_softmax(-1), full.log_softmax(-1)[target_of], full[target_of], mean.double(), text)
    exact_loss, exact_values = weighted(terms, rows, weights.double())
    (exact,) = torch.autograd.grad(exact_loss, leaf)
    return _error(values, exact_values), _error(own, exact)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def algorithms(check: Check) -> None:
    """Train each algorithm for two steps on the CPU and on the device, and compare the losses of the second."""
    for name in check.algorithms:
        algorithm, model = ALGORITHMS[name]
        with _guarded(check, name):
            expected = _trained_loss(check, f"{name}-cpu", algorithm, model, {"accelerator": "cpu"})
            there = {"accelerator": "cpu" if check.device == "cpu" else "gpu", "devices": 1}
            mixed = there | {"precision": "bf16-mixed"}
            check.near(f"{name}, float32", _trained_loss(check, name, algorithm, model, there), expected, 1e-3)
            check.near(
                f"{name}, bf16-mixed", _trained_loss(check, f"{name}-bf16", algorithm, model, mixed), expected, 3e-2
            )
            if name != "eagle3":
                continue
            sharded = _trained_loss(check, "fsdp2", algorithm, model, mixed | {"strategy": "fsdp2"})
            check.near("eagle3, bf16-mixed with fsdp2", sharded, expected, 3e-2)
            compiled = _trained_loss(check, "compiled", algorithm, model | {"compile": True}, there)
            check.near("eagle3, compiled", compiled, expected, 1e-3)


def _trained_loss(check: Check, run: str, algorithm: str, model: dict[str, Any], trainer: dict[str, Any]) -> float:
    """Run ``specforge fit`` for two steps; return the second step's loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {
        **{"algorithm": algorithm, "verifier": str(QUICKSTART / "verifier"), "verifier_dtype": "float32"},
        **{"seed_everything": 1, "output_dir": str(check.folder / run)},
        "trainer": {"max_steps": 2, "max_epochs": 9, "log_every_n_steps": 1, "limit_val_batches": 1, **trainer},
        "model": {**model, "optimizer": {"lr": 1e-4}},
        "data": {
            **{"train": str(_rows(check, "train", 16)), "validation": str(_rows(check, "validation", 4))},
            **{"max_length": 256, "batch_size": 2, "cache_dir": str(check.folder / "cache")},
        },
    }
    config = check.folder / f"{run}.yaml"
    config.write_text(yaml.safe_dump(values))
    specforge("fit", "--config", str(config))
    events = EventAccumulator(str(check.folder / run / "version_0")).Reload()
    return float(events.Scalars("train/loss")[-1].value)


def _rows(check: Check, name: str, number: int) -> Path:
    """Write the first rows of one of the quickstart's files."""
    path = check.folder / f"{name}.jsonl"
    with (QUICKSTART / path.name).open() as file:
        path.write_text("".join(next(file) for _ in range(number)))
    return path


def specforge(*words: str) -> None:
    """Run a command in this process; its output is shown if it fails."""
    from specforge.__main__ import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(list(words))
    if status:
        raise RuntimeError(f"specforge {words[0]} ended with {status}:\n{output.getvalue()[-2000:]}")


def steps(check: Check) -> None:
    """Time a step of EAGLE-3 at several lengths, on stored states and with the verifier."""
    print("  | states | tokens | ms | simulated | tokens/s | MFU | peak memory |\n  |---|---|---|---|---|---|---|")
    for states in ("stored", "live"):
        step = _Step(check, states == "live")
        for tokens in (64, 128) if check.small else (2048, 4096, 8192):
            with _guarded(check, f"{states} {tokens}"):
                seconds, flops, peak = step.measure(tokens)
                known = check.simulated.get(f"{states} {tokens}")
                check.figures |= {f"{states} {tokens}: seconds": seconds, f"{states} {tokens}: bytes": peak}
                print(
                    f"  | {states} | {tokens:,} | {seconds * 1e3:.1f} | {f'{known * 1e3:.1f}' if known else '-'} | "
                    f"{tokens / seconds:,.0f} | {flops / seconds / PEAK:.1%} | {peak / 2**30:.1f} GiB |",
                    flush=True,
                )
        del step


class _Step:
    """A module of EAGLE-3 with random weights on the device, and its optimizer.

    Args:
        check: The run's settings.
        live: Whether the verifier is run.
    """

    def __init__(self, check: Check, live: bool) -> None:
        from types import SimpleNamespace

        from lightning.pytorch import Trainer
        from transformers import AutoModelForCausalLM, LlamaConfig

        from specforge.training.optimizers import OptimizerSettings, build_optimizer
        from specforge.verifier.features import assume_packs
        from specforge.verifier.packed_attention import attend_by_documents
        from specforge.verifier.parts import VerifierParts
        from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module

        self.check, self.live = check, live
        sizes = SMALL if check.small else LLAMA
        config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **sizes)
        config.save_pretrained(check.folder / "verifier")
        settings = Eagle3DraftSettings(draft_vocab_size=config.vocab_size // 4)
        self.module = Eagle3Module(verifier=str(check.folder / "verifier"), draft=settings)
        self.module.trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, enable_checkpointing=False)
        # The whole verifier only where it is run: 16 GB.
        shallow = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers if live else 1})
        with torch.device(check.device):
            verifier = AutoModelForCausalLM.from_config(shallow, dtype=torch.bfloat16).requires_grad_(False).eval()
        attend_by_documents(verifier)
        assume_packs(verifier)
        self.module.teacher.hold(verifier if live else None, VerifierParts.of(verifier))
        counts = torch.arange(config.vocab_size)
        data: Any = SimpleNamespace(vocabulary_counts=lambda: counts)
        self.module.create_draft(data)
        self.module.train().to(check.device)
        self.optimizer = build_optimizer(self.module.draft, OptimizerSettings())
        self.width, self.vocabulary = config.hidden_size, config.vocab_size

    def measure(self, tokens: int) -> tuple[float, int, int]:
        """Return the median seconds of a step, its operations, and the peak of allocated bytes."""
        from torch.utils.flop_counter import FlopCounterMode

        from specforge.estimation.shapes import MORE_FORMULAS

        batch = self._batch(tokens)
        for _ in range(2):
            self._step(batch)
        if self.check.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(1 if self.check.small else ROUNDS):
            begin = time.perf_counter()
            self._step(batch)
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if self.check.device == "cuda" else 0
        with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counted:
            self._step(batch)
        return statistics.median(seconds), counted.get_total_flops(), peak

    def _step(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self.check.device, torch.bfloat16):
            loss = self.module.draft_steps(batch, self.module.features(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.draft.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.check.device == "cuda":
            torch.cuda.synchronize()

    def _batch(self, tokens: int) -> dict[str, Tensor]:
        """Return one row of documents, each supervised at its end, with random states unless the verifier is run."""
        document = SMALL_DOCUMENT if self.check.small else DOCUMENT
        positions = torch.arange(document).repeat(tokens // document)[None]
        batch = {
            "input_ids": torch.randint(self.vocabulary, (1, tokens)),
            "loss_mask": positions >= round(document * (1 - SUPERVISED)),
            "document_ids": (positions == 0).cumsum(1) - 1,
            "position_ids": positions,
        }
        if not self.live:
            layers = len(self.module.aux_layers)
            batch["aux"] = torch.randn(1, tokens, layers, self.width, dtype=torch.bfloat16)
            batch["last"] = torch.randn(1, tokens, self.width, dtype=torch.bfloat16)
        return {name: one.to(self.check.device) for name, one in batch.items()}


def decoding(check: Check) -> None:
    """Time the parts of a decoding round, with a draft of the quickstart after two steps."""
    from specforge.evaluation.results import Results

    algorithm, model = ALGORITHMS["eagle3"]
    there = {"accelerator": "cpu" if check.device == "cpu" else "gpu", "devices": 1}
    _trained_loss(check, "decoded", algorithm, model, there)
    draft, report = check.folder / "decoded" / "version_0" / "draft", check.folder / "report"
    few = ("--limit", "2", "--max_new_tokens", "8") if check.small else ("--limit", "16", "--max_new_tokens", "64")
    prompts = ("--prompts", str(QUICKSTART / "validation.jsonl"), "--baselines")
    specforge("evaluate", str(draft), *prompts, *few, "--output", str(report), "--verifier_dtype", "float32")
    results = Results.model_validate_json((report / "results.json").read_text())
    print(f"  on {results.machine}\n  | draft | ms per round: draft | verifier | loop |\n  |---|---|---|---|")
    for one in results.contenders:
        parts = one.all_sets.draft_milliseconds, one.all_sets.verifier_milliseconds, one.all_sets.other_milliseconds
        check.figures |= {
            f"decoding, ms {name}": ms for name, ms in zip(("draft", "verifier", "loop"), parts, strict=True)
        }
        print(f"  | {one.name} | " + " | ".join(f"{ms:.2f}" for ms in parts) + " |", flush=True)


@contextlib.contextmanager
def _guarded(check: Check, what: str) -> Iterator[None]:
    """Record an error as a failure, so that the other checks still run."""
    try:
        yield
    except Exception:
        check.failed(f"{what}:\n{traceback.format_exc(limit=-4)}")


PARTS: dict[str, Callable[[Check], None]] = {one.__name__: one for one in (kernels, algorithms, steps, decoding)}


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts, print what they find, and write every figure.

    Args:
        words: The command's arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"Of {', '.join(PARTS)}; default all."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="Default: cuda.")
    parser.add_argument("--small", action="store_true", help="Small sizes, to try every part.")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="Default: all.")
    parser.add_argument("--simulated", type=Path, help="JSON file with simulated seconds of a step.")
    parser.add_argument("--output", type=Path, help="JSON file for every figure.")
    arguments = parser.parse_args(words)
    known = json.loads(arguments.simulated.read_text()) if arguments.simulated else {}
    with tempfile.TemporaryDirectory() as folder:
        check = Check(arguments.device, arguments.small, Path(folder), known, arguments.algorithms)
        for name in arguments.parts or PARTS:
            begin = time.perf_counter()
            print(name, flush=True)
            with _guarded(check, name):
                PARTS[name](check)
            check.figures[f"{name}: seconds in all"] = time.perf_counter() - begin
            if arguments.output is not None:  # after each part: the time on a machine may end
                arguments.output.write_text(json.dumps({"failures": check.failures, **check.figures}, indent=1))
    print(f"{len(check.failures)} failure(s)")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
