"""The P-EAGLE network (https://arxiv.org/abs/2602.01469): EAGLE-3 whose later steps do not wait for the earlier ones.

In the rows of ``specforge.models.chain.alignment``, row t at depth k reads

* at k = 0 the token x_{t+1} and the features of token t, as EAGLE-3 does;
* at k >= 1 the mask token and ``mask_hidden``, a learned vector in place of the features.

It is at the position of row t plus k, attends to depth 0 of rows up to t of its document and to its own earlier depths,
and predicts x_{t+2+k}: the attention of training-time test, of which no depth reads another's output. So decoding runs
all depths in one forward pass.

Letters in shapes: B batch rows, T tokens, H width, D draft vocabulary, n aux layers, K depths.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.models.chain.alignment import step_tokens
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge_eagle3.config import Eagle3SpeculatorConfig
from specforge_eagle3.model import FIRST_POSITION, Eagle3DraftModel
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
        """Run all depths at the rows that are needed; arguments and result are EAGLE-3's."""
        attention = TrainingTimeTest(rows)
        positions = position_ids.flatten()[None, rows.order] + FIRST_POSITION
        tokens = step_tokens(input_ids, 1).flatten(1)[:, rows.order]
        feature, mask = self.fuse(aux).flatten(0, 1)[None, rows.order], self.mask_feature()
        states = []
        for depth, count in enumerate(rows.counts):
            if depth:
                tokens = torch.full_like(tokens[:, :count], self.config.mask_token_id)
                feature = mask.expand(1, count, -1)
            own = positions[:, : tokens.shape[1]] + depth
            states.append(self.advance(tokens, feature, own, attention.at(depth), count))
        return cast(Tensor, self.norm(torch.cat(states, dim=1)[0]))

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
