"""The DSpark draft network: DFlash whose slots know the token before, and how sure they are.

What ``states`` returns at each pair is the slot's state, the latent of its Markov head, and the log-odds of its
confidence where the network has that head: [P, H + r + 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from specforge.config import SpeculatorModelConfig
from specforge.models.draft_rows import DraftRows
from specforge.verifier.features import Features
from specforge_dflash.confidence import Confidence
from specforge_dflash.config import DSparkSpeculatorConfig
from specforge_dflash.dspark_drafter import DSparkDrafter
from specforge_dflash.markov import EMBEDDING_DEVIATION, Markov
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.pairs import tokens_before


class DSparkDraftModel(DFlashDraftModel):
    """DSpark: DFlash with a Markov head and a confidence head."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = DSparkSpeculatorConfig
    config: DSparkSpeculatorConfig

    def make_heads(self) -> None:
        """Make the Markov head and the confidence head."""
        config = self.config
        width, rank = config.transformer_layer_config.hidden_size, config.markov_rank
        self.markov_head = Markov(
            config.markov_head_type, config.target_vocab_size, config.draft_vocab_size, width, rank
        )
        self.confidence_head: Confidence | None = None
        if config.enable_confidence_head:
            self.confidence_head = Confidence(width + rank * config.confidence_head_with_markov)

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the blocks of a packed batch, fed with the true tokens before each slot."""
        states = super().states(batch, features, rows)
        embedded = self.markov_head.markov_w1(tokens_before(batch["input_ids"], rows)).to(states.dtype)
        latents = self.markov_head.chain(states, embedded, rows.counts)
        found = [states, latents.to(states.dtype)]
        if self.confidence_head is not None:
            found.append(self._confidence(states, embedded)[:, None].to(states.dtype))
        return torch.cat(found, dim=1)

    def before_head(self, states: Tensor) -> Tensor:
        """Return what the heads read of states: all but the confidence, [..., H + r]."""
        return states[..., : self.head_weights.shape[1] + self.config.markov_rank]

    @property
    def further_head(self) -> Tensor:
        """What reads the latents, [D, r]."""
        return self.markov_head.markov_w2.weight

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Turn what ``states`` returns into logits over the draft vocabulary [..., D]."""
        width = self.head_weights.shape[1]
        latents = self.before_head(hidden)[..., width:]
        return self._biased(self.slot_logits(hidden[..., :width]), latents)

    @property
    def memory_size(self) -> int:
        """Width of what the Markov head carries from slot to slot."""
        return self.markov_head.memory_size

    def conditioned(self, logits: Tensor, states: Tensor, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Add what the Markov head makes of the tokens before."""
        latents, memory = self.markov_head(states, self.markov_head.markov_w1(tokens), memory)
        return self._biased(logits, latents), memory

    def confidence(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-odds that slots' tokens are accepted, [...].

        Args:
            states: Of the slots, [..., H].
            tokens: The tokens before them, the verifier's ids, int64 [...].
        """
        return self._confidence(states, self.markov_head.markov_w1(tokens))

    def drafter(self, batch_size: int) -> DSparkDrafter:
        """Begin to draft for some sequences."""
        return DSparkDrafter(self, batch_size, self.fc.weight.device)

    def _biased(self, logits: Tensor, latents: Tensor) -> Tensor:
        # A stand-in for the verifier has only some of its tokens, and so have the logits.
        return logits + self.markov_head.bias(latents)[..., : logits.shape[-1]]

    def _confidence(self, states: Tensor, embedded: Tensor) -> Tensor:
        head = cast(Confidence, self.confidence_head)
        return cast(Tensor, head(states, embedded) if self.config.confidence_head_with_markov else head(states))

    def _initialise(self, deviation: float) -> None:
        super()._initialise(deviation)
        nn.init.normal_(self.markov_head.markov_w1.weight, std=EMBEDDING_DEVIATION)
