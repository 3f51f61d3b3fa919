"""The MLP speculator (https://arxiv.org/abs/2404.19124): a head for each drafted token, with a state between them.

With f_t the verifier's last state after its final norm, s_0 = f_t and z_i = x_{t+1+i}, head i = 0, 1, ... computes

    s_{i+1} = GELU(ln_i(proj_i s_i + (b / a) emb_i(z_i))),    logits of x_{t+2+i} = head_i s_{i+1}

with a = 0.5 ^ (0.5 / n) and b = sqrt((1 - a^2) I / 2), which keep the shares of state and token steady over n heads.
These are the rows of ``specforge.models.chain.alignment``: row t at step i reads x_{t+1+i}.

Letters in shapes: B rows, T tokens per row, H the verifier's width, I the state's, V vocabulary, n heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models.chain.alignment import step_tokens
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import AttachmentMode, SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features
from specforge.verifier.parts import VerifierParts
from specforge_mlp.candidate_tree import CandidateTreeTokenProposalConfig
from specforge_mlp.config import MLPSpeculatorConfig
from specforge_mlp.drafter import MLPDrafter

EPSILON = 1e-6


class StateNorm(nn.Module):
    """Scales to a root mean square of 1, then by a weight and a bias; the mean is not subtracted.

    Args:
        width: Width of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise states [..., I]."""
        return F.rms_norm(states, self.weight.shape, self.weight, EPSILON) + self.bias


class MLPSpeculator(SpeculatorModel):
    """Drafts with a head for each token, and its own embeddings.

    Shared weights are stored once: there is an ``emb``, ``head`` and ``ln`` for each head, or one for all; and a
    ``proj`` for each, or one for the first head and one for the others.

    Args:
        config: The speculator's configuration.
        verifier: The verifier to attach: a folder, a hub id, or a loaded model; None for no verifier.
        verifier_attachment_mode: ``"full"`` (the default) keeps the whole verifier, ``"train_only"`` only the parts
            that its features need, and ``"detached"`` attaches nothing.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = MLPSpeculatorConfig
    config: MLPSpeculatorConfig

    def __init__(
        self,
        config: MLPSpeculatorConfig,
        verifier: str | os.PathLike[str] | PreTrainedModel | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
    ) -> None:
        super().__init__(config)
        heads, inner = config.num_layers, config.state_size
        distinct = 1 if config.tie_weights else heads
        projections = min(heads, 2) if config.tie_weights else heads
        widths = [config.hidden_size] + [inner] * (projections - 1)
        self.emb = nn.ModuleList(nn.Embedding(config.vocab_size, inner) for _ in range(distinct))
        self.proj = nn.ModuleList(nn.Linear(width, inner, bias=False) for width in widths)
        self.ln = nn.ModuleList(StateNorm(inner) for _ in range(distinct))
        self.head = nn.ModuleList(nn.Linear(inner, config.vocab_size, bias=False) for _ in range(distinct))
        state_weight = 0.5 ** (0.5 / heads)
        self.embedding_scale = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=inner**-0.5)
        if verifier is not None and verifier_attachment_mode != "detached":
            self.attach_verifier(verifier, verifier_attachment_mode)

    @classmethod
    def from_training_args(cls, verifier_config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Create the draft for a verifier from training arguments.

        Args:
            verifier_config: The verifier's transformers configuration.
            **kwargs: ``num_layers`` (3 heads), ``intermediate_size`` (0: the verifier's width), ``tie_weights`` (True),
                ``scale_input`` (True), ``top_k_tokens_per_head``, ``n_candidates`` (5), ``verifier_name_or_path``.

        Returns:
            The draft with random weights.
        """
        text = verifier_config.get_text_config()
        optional = {name: kwargs[name] for name in ("top_k_tokens_per_head", "n_candidates") if kwargs.get(name)}
        config = MLPSpeculatorConfig(
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            intermediate_size=kwargs.get("intermediate_size", 0),
            num_layers=kwargs.get("num_layers", 3),
            tie_weights=kwargs.get("tie_weights", True),
            inputs_hidden_states_normalized=kwargs.get("scale_input", True),
            **optional,
        )
        verifier = VerifierConfig.from_config(verifier_config, kwargs.get("verifier_name_or_path"))
        config.speculators_config = proposals_of(config, verifier)
        return cls(config)

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of ``forward`` that depend on training settings: none, in training and validation.

        Args:
            **kwargs: Training arguments; all are ignored.
        """
        return {}, {}

    @property
    def head_weights(self) -> Tensor | list[Tensor]:
        """The shared head of all steps, [V, I], or a list with one for each."""
        weights = [cast(Tensor, head.weight) for head in self.head]
        return weights[0] if len(weights) == 1 else weights

    def attach_verifier(
        self,
        verifier: str | os.PathLike[str] | PreTrainedModel | VerifierParts,
        mode: Literal["full", "train_only"] | None = None,
    ) -> PreTrainedModel | VerifierParts:
        """Attach the verifier whose states the draft reads, after its final norm.

        Args:
            verifier: A folder, a hub id, a loaded model, or its parts.
            mode: ``"full"`` (the default) keeps the whole model, which ``generate`` needs; ``"train_only"`` its parts.

        Returns:
            The attached verifier: the model, or its parts.

        Raises:
            UsageError: The verifier cannot be loaded, or its width or vocabulary differs from the draft's.
        """
        attached = super().attach_verifier(verifier, mode)
        own = self.verifier_parts.config
        for what, expected, found in (
            ("width", self.config.hidden_size, own.hidden_size),
            ("vocabulary", self.config.vocab_size, own.vocab_size),
        ):
            if expected != found:
                self.detach_verifier()
                raise UsageError(f"the draft was made for a verifier with a {what} of {expected:,}, not {found:,}")
        return attached

    def first_state(self, features: Features) -> Tensor:
        """Return the first head's input, [..., H]: the verifier's last state after its final norm."""
        with torch.no_grad():
            last: Tensor = self.verifier_parts.norm(features.last)
        return last.to(next(self.proj.parameters()).dtype)

    def advance(self, states: Tensor, tokens: Tensor, step: int) -> Tensor:
        """Compute the next state from one more token.

        Args:
            states: The verifier's states [..., H] at step 0, this network's [..., I] later.
            tokens: The token after each state, [...].
            step: Index of the head.

        Returns:
            The next states [..., I], the input of that head.
        """
        if step == 0 and self.config.inputs_hidden_states_normalized:
            states = F.rms_norm(states, states.shape[-1:], eps=EPSILON) / math.sqrt(2)
        embedded = _of(self.emb, step)(tokens)
        states = _of(self.proj, step)(states) + self.embedding_scale * embedded
        return F.gelu(_of(self.ln, step)(states))

    def forward(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        """Predict the next tokens of each row with every head, fed with the true tokens.

        Args:
            input_ids: Shifted tokens, [B, T + n - 1]: entry i holds x_{i+1}.
            hidden_states: The verifier's last states after its final norm, [B, T, H]: row t holds that of x_t.

        Returns:
            Logits [n, B, T, V]; those of head i at row t are for x_{t+2+i}. Training never computes them all at once.
        """
        length = hidden_states.shape[1]
        states, logits = hidden_states, []
        for step in range(self.config.num_layers):
            states = self.advance(states, input_ids[:, step : step + length], step)
            logits.append(self.logits(states, step))
        return torch.stack(logits)

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the first heads; positions and documents are ignored.

        Raises:
            UsageError: More steps than heads are requested.
        """
        steps = len(rows.counts)
        if steps > self.config.num_layers:
            raise UsageError(f"this draft has {self.config.num_layers} heads, but {steps} steps are requested")
        tokens = step_tokens(batch["input_ids"], steps).flatten(1)
        last = features.last.flatten(0, 1)[rows.order[: rows.counts[0]]]
        states, outputs = self.first_state(Features(features.aux, last)), []
        for step, count in enumerate(rows.counts):
            states = self.advance(states[:count], tokens[step, rows.order[:count]], step)
            outputs.append(states)
        return torch.cat(outputs)

    def drafter(self, batch_size: int) -> MLPDrafter:
        """Create a drafter for a batch of sequences."""
        return MLPDrafter(self)


def proposals_of(config: MLPSpeculatorConfig, verifier: VerifierConfig) -> SpeculatorsConfig:
    """Return a draft's proposal methods: a chain as long as the number of heads, or the published tree."""
    return SpeculatorsConfig(
        algorithm=MLPSpeculatorConfig.model_type_name,
        proposal_methods=[
            GreedyTokenProposalConfig(speculative_tokens=config.num_layers),
            CandidateTreeTokenProposalConfig(
                top_k_tokens_per_head=config.top_k_tokens_per_head, n_candidates=config.n_candidates
            ),
        ],
        default_proposal_method="greedy",
        verifier=verifier,
    )


def _of(modules: nn.ModuleList, step: int) -> nn.Module:
    """Return a step's module: its own, or the last one, which later steps share."""
    return modules[min(step, len(modules) - 1)]
