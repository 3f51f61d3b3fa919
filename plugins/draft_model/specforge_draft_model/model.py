"""A causal language model of transformers as a draft.

It reads only the text, not the verifier's states. The state that predicts x_{t+2+k}, which row t drafts at step
k (see ``specforge.models.chain.alignment``), is the model's own at token t + 1 + k, whatever t and k are: one pass over
the text gives the states of all steps.

Letters in shapes: B rows, T tokens a row, H the model's width, D its vocabulary, P pairs of row and step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.data.host_masks import HostMasks
from specforge.decoding.verifier import why_no_trees
from specforge.documents import DocumentLayout
from specforge.errors import UsageError
from specforge.models.base_components import norm_scale, start_norm
from specforge.models.draft_rows import DraftRows
from specforge.models.lean_blocks import use_memory_saving_blocks
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features
from specforge.verifier.packed_attention import attend_by_documents, attending_to, document_numbers
from specforge.verifier.parts import VerifierParts, decoder, final_norm, scaled_logits
from specforge_draft_model.config import DraftModelConfig
from specforge_draft_model.drafter import ModelDrafter


class DraftModel(SpeculatorModel):
    """Drafts with a causal language model whose token ids are the verifier's.

    Args:
        config: The draft's configuration.

    Raises:
        UsageError: The model keeps a state that cannot be rolled back, or does not attend as drafts have to.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = DraftModelConfig
    config: DraftModelConfig

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__(config)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config.language_model, dtype=torch.float32)
        if reason := why_no_trees(model):
            raise UsageError(f"{type(model).__name__} cannot draft: {reason}")
        # Families that attend eagerly keep the documents of a row apart by a mask.
        attend_by_documents(model)
        head = model.get_output_embeddings()
        if head.bias is not None:
            # Distillation computes gradients only for heads' matrices.
            head.bias.requires_grad_(False)
        elif head.weight is model.get_input_embeddings().weight:
            # Held once, as it is stored.
            model.set_output_embeddings(nn.Identity())
        use_memory_saving_blocks(model)
        self.language_model = model.eval()

    @classmethod
    def from_training_args(
        cls,
        verifier_config: PreTrainedConfig,
        language_model: PreTrainedConfig,
        verifier_name_or_path: str | None = None,
        speculative_tokens: int = 5,
    ) -> Self:
        """Create the draft for a verifier, at random.

        Args:
            verifier_config: The verifier's transformers configuration.
            language_model: That of the draft.
            verifier_name_or_path: Folder or hub id of the verifier.
            speculative_tokens: Tokens that the draft is meant to propose in a round.
        """
        verifier = VerifierConfig.from_config(verifier_config, verifier_name_or_path)
        stored = proposals_for(verifier, speculative_tokens)
        return cls(DraftModelConfig(language_model=language_model, speculators_config=stored))

    @property
    def vocabulary_size(self) -> int:
        """Number D of tokens that it knows."""
        return int(self.language_model.get_input_embeddings().weight.shape[0])

    @property
    def draft_ids(self) -> Tensor | None:
        """The verifier's ids of its tokens, the first D; None where the vocabularies are the same."""
        if self._attached is None or self.verifier_parts.config.vocab_size == self.vocabulary_size:
            return None
        return torch.arange(self.vocabulary_size, device=self.head_weights.device)

    def known(self, tokens: Tensor) -> Tensor:
        """Return tokens [...], with ids beyond its table replaced by its last one."""
        return tokens.clamp(max=self.vocabulary_size - 1)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the language model drops nothing out, so that it is trained as it drafts."""
        super().train(mode)
        self.language_model.eval()
        return self

    def attach_verifier(
        self,
        verifier: str | os.PathLike[str] | PreTrainedModel | VerifierParts,
        mode: Literal["full", "train_only"] | None = None,
    ) -> PreTrainedModel | VerifierParts:
        """Attach the verifier that the draft drafts for.

        Args:
            verifier: A folder, a hub id, a loaded model, or its parts.
            mode: ``"full"`` (the default) keeps the whole model, which ``generate`` needs; ``"train_only"`` its parts.

        Returns:
            What was attached: the model, or its parts.

        Raises:
            UsageError: The verifier cannot be loaded, or knows fewer tokens than the draft.
        """
        attached = super().attach_verifier(verifier, mode)
        most = self.verifier_parts.config.vocab_size
        if self.vocabulary_size > most:
            self.detach_verifier()
            raise UsageError(f"the draft has {self.vocabulary_size:,} tokens, and the verifier only {most:,}")
        return attached

    @torch.no_grad()
    def borrow_weights(self) -> None:
        """Start from the attached verifier's embeddings, head and scale of its final norm, if they have its width."""
        parts, embeddings = self.verifier_parts, self.language_model.get_input_embeddings().weight
        if embeddings.shape != parts.embed_tokens.weight.shape:
            return
        embeddings.copy_(parts.embed_tokens.weight)
        start_norm(final_norm(self.language_model), norm_scale(parts.norm, embeddings.shape[1]))
        # A tied head has no tensors of its own, and one of another family perhaps no bias.
        self.language_model.get_output_embeddings().load_state_dict(parts.lm_head.state_dict(), strict=False)

    def advance(self, tokens: Tensor, position_ids: Tensor, documents: DocumentLayout | None = None) -> Tensor:
        """Run the language model's decoder over packed rows.

        Args:
            tokens: The verifier's ids, [B, T].
            position_ids: Positions, which restart at 0 with each document, [B, T].
            documents: Where the documents are. By default they begin where positions do not increase by 1, and a device
                waits until that is found.

        Returns:
            What the head reads, [B, T, H].
        """
        documents = DocumentLayout.of(document_numbers(position_ids)) if documents is None else documents
        with attending_to(documents, tokens.device):
            output = decoder(self.language_model)(
                input_ids=self.known(tokens), position_ids=position_ids, use_cache=False
            )
        return cast(Tensor, output.last_hidden_state)

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the language model once; the verifier's states are not looked at."""
        documents = HostMasks.of(batch).documents
        states = self.advance(batch["input_ids"], batch["position_ids"], documents).flatten(0, 1)
        last = len(states) - 1
        # Rows at the end of the batch read past it, and never count there.
        taken = [(rows.order[:count] + 1 + step).clamp(max=last) for step, count in enumerate(rows.counts)]
        return states[torch.cat(taken)]

    @property
    def head_weights(self) -> Tensor:
        """The head of all steps, [D, H]; the embeddings where it is tied to them."""
        head = self.language_model.get_output_embeddings()
        tied = isinstance(head, nn.Identity)
        return cast(Tensor, (self.language_model.get_input_embeddings() if tied else head).weight)

    @property
    def finish(self) -> Callable[[Tensor], Tensor]:
        """The bias, scaling and soft cap of the model's family."""
        return self._finished

    def _finished(self, logits: Tensor) -> Tensor:
        bias = getattr(self.language_model.get_output_embeddings(), "bias", None)
        return scaled_logits(logits if bias is None else logits + bias, self.language_model.config)

    def drafter(self, batch_size: int) -> ModelDrafter:
        """Begin to draft for some sequences."""
        return ModelDrafter(self, batch_size)

    def reset_constants(self) -> None:
        """Compute again the buffers that no checkpoint holds, such as rotary frequencies, in their own types."""
        with torch.device("cpu"), no_init_weights():
            fresh = AutoModelForCausalLM.from_config(self.config.language_model, dtype=torch.float32)
        stored, device = self.language_model.state_dict().keys(), self.head_weights.device
        for name, constant in fresh.named_buffers():
            if name not in stored:
                module, _, own = name.rpartition(".")
                self.language_model.get_submodule(module).register_buffer(own, constant.to(device), persistent=False)


def proposals_for(verifier: VerifierConfig, speculative_tokens: int = 5) -> SpeculatorsConfig:
    """Return what a draft model is meant for: chains."""
    return SpeculatorsConfig(
        algorithm=DraftModelConfig.model_type_name,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=speculative_tokens)],
        default_proposal_method="greedy",
        verifier=verifier,
    )
