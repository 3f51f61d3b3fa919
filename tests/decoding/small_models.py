"""Random verifiers of three layers in float64, drafts for them, and their output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import random_verifiers
import torch
from random_verifiers import SLIDING
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from specforge.config import SpeculatorModelConfig
from specforge.decoding.loop import Decoder, Emission
from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features, capture
from specforge_eagle3.model import Eagle3DraftModel

CONTEXT = 36
AUX_LAYERS = [0, 1, 3]
SHAPE: dict[str, Any] = {**random_verifiers.SHAPE, "max_position_embeddings": CONTEXT}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "untied llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, **SLIDING, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **SLIDING, query_pre_attn_scalar=8),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=5),
}


def random_model(config: PreTrainedConfig, seed: int = 0, scale: float = 0.3, **options: Any) -> PreTrainedModel:
    """Create a verifier whose layers matter and whose norm weights are far from one."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else scale * noise)
    model.tie_weights()
    return model.double().eval().requires_grad_(False)


def random_draft(verifier: PreTrainedModel, seed: int = 0, size: int | None = None, **options: Any) -> Eagle3DraftModel:
    """Create an untrained EAGLE-3 draft; with a pruned draft vocabulary if a size is given."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = verifier.config.vocab_size
    if size is not None:
        options["t2d"] = torch.zeros(vocabulary, dtype=torch.bool)
        options["t2d"][torch.randperm(vocabulary, generator=generator)[:size]] = True
    draft = Eagle3DraftModel.from_training_args(verifier.config, **{"aux_layer_ids": AUX_LAYERS, **options})
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.4 * noise)
    draft.attach_verifier(verifier)
    return draft.double()


def learn(draft: Eagle3DraftModel, verifier: PreTrainedModel, texts: Sequence[Tensor], updates: int = 60) -> None:
    """Overfit a draft on some texts, with training-time test."""
    steps = 4
    tokens = pad_sequence(texts, batch_first=True)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    documents = torch.where(position < torch.tensor([len(text) for text in texts])[:, None], 0, -1)
    features = capture(verifier, tokens, position, draft.aux_layers)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(updates):
            logits = draft.logits(draft.unroll(tokens, features, position, documents, steps))
            loss = torch.zeros(())
            for step in range(steps):
                own, targets = logits[step, :, : -2 - step], tokens[:, 2 + step :]
                real = documents[:, 2 + step :] >= 0
                loss = loss + torch.nn.functional.cross_entropy(own[real], targets[real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Oracle(SpeculatorModel):
    """Knows the verifier's output and ranks its next token first most of the time, otherwise lower.

    Args:
        texts: Prompts with the verifier's output.
        vocabulary: Size of the verifier's vocabulary.
        share: Probability that the right token comes first.
        max_depth: Maximum number of tokens on a drafted path.
    """

    def __init__(
        self, texts: Iterable[Sequence[int]], vocabulary: int, share: float = 0.7, max_depth: int | None = None
    ) -> None:
        super().__init__(SpeculatorModelConfig(speculators_model_type="oracle"))
        # A drafter never sees the first token of a prompt.
        self.known = [tuple(text)[1:] for text in texts]
        self.vocabulary = vocabulary
        self.share = share
        self.max_depth = max_depth

    def drafter(self, batch_size: int) -> OracleDrafter:
        return OracleDrafter(self, batch_size)

    def logits_after(self, path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash(path) % 2**31)
        logits = torch.randn(self.vocabulary, generator=generator, dtype=torch.float64)
        right = next(
            (text[len(path)] for text in self.known if text[: len(path)] == path and len(text) > len(path)), None
        )
        if right is not None:
            # Second or third if it is not first: a tree may still hold it.
            logits[right] = 9.0 if torch.rand((), generator=generator) < self.share else logits.max() - 0.5
        return logits


class OracleDrafter(Drafter):
    def __init__(self, oracle: Oracle, batch_size: int) -> None:
        self.oracle = oracle
        self.max_depth = oracle.max_depth
        self.paths: list[list[tuple[int, ...]]] = [[()] for _ in range(batch_size)]

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        new = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
        self.paths = [[(*paths[0], *more)] for paths, more in zip(self.paths, new, strict=True)]
        self.root = self._read([paths[0] for paths in self.paths])

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        logits = []
        for paths, own, own_parents in zip(self.paths, tokens.tolist(), parents.tolist(), strict=True):
            # The root's path comes before those of the nodes.
            new = [(*paths[parent + 1], token) for token, parent in zip(own, own_parents, strict=True)]
            paths += new
            logits.append(self._read(new))
        return torch.stack(logits)

    def select(self, rows: Tensor) -> None:
        self.paths = [self.paths[row] for row in rows.tolist()]

    def _read(self, paths: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.stack([self.oracle.logits_after(path) for path in paths])


def generated(verifier: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> list[int]:
    """The greedy output of transformers for this prompt, without a batch."""
    tokens = torch.tensor([list(prompt)])
    output = verifier.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=max_new_tokens, **options
    )
    return output[0, len(prompt) :].tolist()


def decoded(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """A decoder's output for each prompt of a batch."""
    output: list[list[int]] = [[] for _ in prompts]
    for emission in emissions(decoder, prompts, max_new_tokens, **options):
        output[emission.sequence] += emission.tokens
    return output


def emissions(
    decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[Emission]:
    return list(decoder.decode([torch.tensor(list(prompt)) for prompt in prompts], max_new_tokens, **options))


def uncached_logits(verifier: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """The verifier's logits after each token of a text, [T, V], in one forward pass without a cache."""
    return verifier(torch.tensor([list(text)]), use_cache=False).logits[0]
