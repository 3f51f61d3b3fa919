"""``specforge plugins check``: run an algorithm on a tiny random verifier, from two training steps to decoding.

Letters in shapes: T tokens, S draft steps, D draft vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.config import TokenProposalConfig
from specforge.errors import SpecforgeError, UsageError
from specforge.hookspecs import Algorithm
from specforge.models.speculator import SpeculatorModel
from specforge.proposals.choice import choose_proposal
from specforge.registry import installed
from specforge.verifier.features import Features, capture

# Enough tokens and layers for the defaults of the algorithms in this repository.
VOCABULARY, LAYERS, WIDTH = 32768, 8, 32
LENGTH, NEW_TOKENS, STEPS = 24, 16, 4
# In float64; an off-by-one index causes far larger differences.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Trial:
    """A draft after two steps of training, in float64, attached to its verifier.

    Attributes:
        name: The algorithm.
        draft: The draft.
        verifier: The verifier.
        tokens: A text, int64 [T].
    """

    name: str
    draft: SpeculatorModel
    verifier: LlamaForCausalLM
    tokens: Tensor

    @property
    def steps(self) -> int:
        """Number of draft steps to check."""
        return min(STEPS, self.draft.drafter(1).max_depth or STEPS)

    @torch.no_grad()
    def logits(self) -> list[Tensor]:
        """Return the logits of ``unroll`` over the text, [T, D] for each step."""
        positions = torch.arange(len(self.tokens))[None]
        features = capture(self.verifier, self.tokens[None], positions, self.draft.aux_layers)
        hidden = self.draft.unroll(self.tokens[None], features, positions, torch.zeros_like(positions), self.steps)
        if hidden.shape[:3] != (self.steps, 1, len(self.tokens)):
            expected = f"[{self.steps}, 1, {len(self.tokens)}, H]"
            raise SpecforgeError(f"unroll returns {list(hidden.shape)}, but must return {expected}")
        return [self.draft.logits(hidden[step, 0], step) for step in range(self.steps)]


def check_algorithm(name: str, settings: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Check an algorithm; yield the name of each check with its fault, or None.

    Args:
        name: The algorithm.
        settings: Further arguments for ``specforge fit``.

    Raises:
        UsageError: The algorithm does not exist, or its plugin does not train it.
    """
    algorithm = installed().find(Algorithm, name)
    if algorithm.module is None or algorithm.data is None:
        raise UsageError(f"the algorithm {name!r} can be loaded, but its plugin does not train it: nothing to check")
    with tempfile.TemporaryDirectory(prefix="specforge-check-") as temporary:
        folder = Path(temporary)
        verifier = write_verifier(folder / "verifier")
        fault = train(name, folder, settings)
        yield "two steps of training, validation, a checkpoint", fault
        if fault is not None:
            return
        try:
            draft = SpeculatorModel.from_pretrained(folder / "run" / "draft").cast(torch.float64)
            draft.attach_verifier(verifier)
        except Exception as error:  # of the plugin's own code, which may fail in any way
            yield "the checkpoint is read", _described(error)
            return
        trial = Trial(name, draft.eval(), verifier, torch.arange(LENGTH) * 37 % 1000 + 3)
        checks: dict[str, Callable[[Trial], str | None]] = {
            "the checkpoint is read back unchanged": partial(reading, folder=folder),
            "shapes of states and logits": shapes,
            "the drafter agrees with unroll": drafting,
            "rows do not read later tokens": causality,
            **{f"{one}: the text is the verifier's own": partial(decoding, method=one) for one in algorithm.proposals},
        }
        for what, check in checks.items():
            try:
                yield what, check(trial)
            except Exception as error:  # of the plugin's own code, which may fail in any way
                yield what, _described(error)


def write_verifier(folder: Path) -> LlamaForCausalLM:
    """Write a random Llama, and return it in float64."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        initializer_range=0.3,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **heads,
    )
    verifier = LlamaForCausalLM(config)
    verifier.save_pretrained(folder)
    return verifier.double().eval().requires_grad_(False)


def train(name: str, folder: Path, settings: Sequence[str]) -> str | None:
    """Run two optimizer steps and a validation, as a user would; return the end of the error output if that fails."""
    numbers = torch.arange(8 * 32).view(8, 32) * 31 % 1000 + 3
    rows = [json.dumps({"input_ids": one.tolist(), "loss_mask": [0] * 8 + [1] * 24}) for one in numbers]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = [
        *("--algorithm", name, "--verifier", str(folder / "verifier"), "--output_dir", str(folder)),
        *("--run_name", "run", "--data.train", str(folder / "rows.jsonl")),
        *("--data.validation", str(folder / "rows.jsonl"), "--data.max_length", "64", "--trainer.max_steps", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"),
        *("--trainer.enable_progress_bar", "false", "--data.cache_dir", str(folder / "cache")),
    ]
    command = [sys.executable, "-m", "specforge", "fit", *words, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else "\n".join(done.stderr.strip().splitlines()[-8:])


def reading(trial: Trial, folder: Path) -> str | None:
    """Return a fault if a draft changes when it is written and read, or is stored under another algorithm."""
    first = SpeculatorModel.from_pretrained(folder / "run" / "draft")
    first.save_pretrained(folder / "again")
    again = SpeculatorModel.from_pretrained(folder / "again").state_dict()
    for name, tensor in first.state_dict().items():
        if not torch.equal(tensor, again[name]):
            return f"{name} differs after it is written and read back"
    stored = first.config.speculators_config
    if stored is None:
        return "the configuration has no speculators_config, which names the verifier and the proposal methods"
    if stored.algorithm != trial.name:
        return f"speculators_config.algorithm is {stored.algorithm!r}, but must be {trial.name!r}"
    return None


def shapes(trial: Trial) -> str | None:
    """Return a fault if logits are not finite, or not as wide as the draft's vocabulary."""
    ids = trial.draft.draft_ids
    width = VOCABULARY if ids is None else len(ids)
    for step, logits in enumerate(trial.logits()):
        if logits.shape != (LENGTH, width):
            return f"logits of step {step} are {list(logits.shape)}, but must be [{LENGTH}, {width}]"
        if not bool(torch.isfinite(logits).all()):
            return f"logits of step {step} are not finite"
    return None


@torch.no_grad()
def drafting(trial: Trial) -> str | None:
    """Return a fault if chains along the text have other logits than ``unroll``, after one or several commits."""
    expected, tokens = trial.logits(), trial.tokens
    positions = torch.arange(LENGTH)[None]
    features = capture(trial.verifier, tokens[None], positions, trial.draft.aux_layers)
    drafter = trial.draft.drafter(1)
    drafter.begin(tokens[:1])
    begin = 0
    for end in (6, 7, 11):
        new = Features(features.aux[:, begin:end], features.last[:, begin:end])
        drafter.commit(tokens[None, begin + 1 : end + 1], new, torch.tensor([end - begin]))
        found = [drafter.root[0]]
        for step in range(1, trial.steps):
            # The tokens after the last committed one, each the child of the one before it.
            token, parent = tokens[None, end + step : end + step + 1], torch.tensor([[step - 2]])
            found.append(drafter.step(token, parent)[0, 0])
        for step, logits in enumerate(found):
            if fault := _difference(logits, expected[step][end - 1]):
                return f"after {end} tokens, draft step {step}: {fault}"
        begin = end
    return None


def causality(trial: Trial) -> str | None:
    """Return a fault if row t at step k depends on tokens after x_{t+1+k}, the last one that it may read."""
    before = trial.logits()
    middle = LENGTH // 2
    tokens = torch.cat([trial.tokens[:middle], trial.tokens[middle:] + 1])
    after = Trial(trial.name, trial.draft, trial.verifier, tokens).logits()
    for step in range(trial.steps):
        # Row t reads the tokens up to x_{t+1+k}: all of them before the middle.
        rows = slice(0, middle - 1 - step)
        if fault := _difference(after[step][rows], before[step][rows]):
            return f"step {step}, on a text that differs from token {middle}: {fault}"
    return None


def decoding(trial: Trial, method: str) -> str | None:
    """Return a fault if text at temperature 0 differs from the verifier's own."""
    prompts = torch.stack([trial.tokens[:5], trial.tokens[9:14]])
    own = trial.verifier.generate(prompts, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    proposal = _shallow(choose_proposal(method, trial.draft.config), trial.draft.drafter(1).max_depth)
    text = trial.draft.generate(prompts, max_new_tokens=NEW_TOKENS, proposal=proposal, pad_token_id=0)
    assert isinstance(text, Tensor)
    if torch.equal(text, own):
        return None
    return f"the text is {text[0, 5:].tolist()}, but the verifier's own is {own[0, 5:].tolist()}"


def _shallow(proposal: TokenProposalConfig, depth: int | None) -> TokenProposalConfig:
    """Return a proposal method's settings with chains or trees no deeper than the draft's."""
    # A tree has ``depth``; its ``speculative_tokens`` count nodes.
    name = next((one for one in ("depth", "speculative_tokens") if one in type(proposal).model_fields), None)
    if depth is None or name is None:
        return proposal
    return proposal.model_copy(update={name: min(depth, getattr(proposal, name))})


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"logits are {list(found.shape)}, but must be {list(expected.shape)}"
    furthest = float((found - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    return None if furthest <= allowed else f"logits are up to {furthest:.3g} off, {allowed:.1g} is allowed"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
