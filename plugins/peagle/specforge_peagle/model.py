"""The P-EAGLE network (https://arxiv.org/abs/2602.01469): EAGLE-3 whose later steps do not wait for the earlier ones.

In the rows of ``specforge.models.chain.alignment``, row t at depth k reads

* at k = 0 the token x_{t+1} and the features of token t, as EAGLE-3 does;
* at k >= 1 the mask token and ``mask_hidden``, a learned vector in place of the features.

It is at the position of row t plus k, attends to depth 0 of rows up to t of its document and to its own earlier depths,
and predicts x_{t+2+k}: the attention of training-time test, of which no depth reads another's output. So training and
decoding run all depths in one forward pass.

Letters in shapes: B batch rows, T tokens, H width, D draft vocabulary, n aux layers, K depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.models.chain.alignment import step_tokens
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_attention import DraftAttention
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge_eagle3.config import Eagle3SpeculatorConfig
from specforge_eagle3.model import FIRST_POSITION, Eagle3DraftModel, run_layer
from specforge_peagle.config import PEagleSpeculatorConfig
from specforge_peagle.drafter import ParallelDrafter


class PEagleDraftModel(Eagle3DraftModel):
    """The P-EAGLE draft; its token embeddings are its own, and trained with the mask token's among them.

    Args:
        config: The draft's configuration.
        own_embeddings: As for EAGLE-3.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = PEagleSpeculatorConfig
    config: PEagleSpeculatorConfig

    def __init__(self, config: PEagleSpeculatorConfig, own_embeddings: bool | None = None) -> None:
        super().__init__(config, own_embeddings)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))

    @classmethod
    def from_training_args(cls, verifier_config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Create the draft from EAGLE-3's arguments, and ``mask_token_id``; ``ttt_steps`` is the number of depths."""
        fields = {"mask_token_id": kwargs["mask_token_id"]}
        return super().from_training_args(verifier_config, embed_requires_grad=True, further_fields=fields, **kwargs)

    def mask_feature(self) -> Tensor:
        """Return what is read in place of fused features, [1, 1, H]."""
        return self.fuse(self.mask_hidden.view(1, 1, self.config.num_aux_layers, -1))

    def chain(self, input_ids: Tensor, aux: Tensor, position_ids: Tensor, rows: DraftRows) -> Tensor:
        """Run all depths at the rows that are needed in one pass; arguments and result are EAGLE-3's."""
        needed, pairs = rows.counts[0], sum(rows.counts)

        def joined(of_first: Tensor, *of_later: Tensor) -> Tensor:
            """Join the needed rows depth by depth, and then those that depth 0 only attends to."""
            return torch.cat([of_first[:needed], *of_later, of_first[needed:]])[None]

        tokens = step_tokens(input_ids, 1).flatten()[rows.order]
        feature = self.fuse(aux).flatten(0, 1)[rows.order]
        positions = position_ids.flatten()[rows.order] + FIRST_POSITION
        states = self.run(
            joined(tokens, tokens.new_full((pairs - needed,), self.config.mask_token_id)),
            joined(feature, self.mask_feature()[0].expand(pairs - needed, -1)),
            joined(positions, *(positions[:count] + depth for depth, count in enumerate(rows.counts) if depth)),
            TrainingTimeTest(rows).at_once(),
            pairs,
        )
        return cast(Tensor, self.norm(states[0]))

    def run(
        self,
        tokens: Tensor,
        feature: Tensor,
        position_ids: Tensor,
        attention: DraftAttention,
        wanted: int | None = None,
    ) -> Tensor:
        """Run all layers; arguments and result are those of EAGLE-3's ``advance``."""
        rotary = self.rotary_emb(feature, position_ids)
        states = [self.embed(tokens), feature]
        *others, last = self.layers
        for layer in others:
            states = [self.advance(layer, states, rotary, attention)]
        return self.advance(last, states, rotary, attention, wanted)

    def advance(  # type: ignore[override]
        self,
        layer: nn.Module,
        states: Sequence[Tensor],
        rotary: Sequence[Tensor],
        attention: DraftAttention,
        wanted: int | None = None,
    ) -> Tensor:
        """Run one layer, since one step of training runs all depths; see ``run_layer``."""
        return run_layer(layer, states, rotary, attention, wanted)

    def borrow_embeddings(self) -> None:
        """Keep the draft's own embeddings: the mask token's has been trained."""

    def read_start(self, name_or_path: str) -> Self:
        """Read the draft whose weights training starts from; that of EAGLE-3 gets this draft's mask state."""
        config = SpeculatorModelConfig.from_pretrained(name_or_path)
        if config.speculators_model_type != Eagle3SpeculatorConfig.model_type_name:
            return super().read_start(name_or_path)
        eagle = Eagle3DraftModel.from_pretrained(name_or_path)
        eagle.attach_verifier(self.verifier_parts)
        eagle.own_embeddings()
        own = {
            name: getattr(self.config, name) for name in ("speculators_model_type", "architectures", "mask_token_id")
        }
        values = config.to_dict() | own | {"embed_requires_grad": True}
        state = eagle.state_dict() | {"mask_hidden": self.mask_hidden.detach().to(eagle.dtype)}
        return type(self).from_state(PEagleSpeculatorConfig.from_dict(values), state, where=name_or_path)

    def drafter(self, batch_size: int) -> Drafter:
        """Begin to draft for some sequences."""
        return ParallelDrafter(self, batch_size, self.fc.weight.device)
