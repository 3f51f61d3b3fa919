"""What the families of multi-token-prediction heads call their tensors, and what each computes from them.

Read in vLLM 0.32, SGLang 0.5.14 and llama.cpp, which run these heads. All feed back the state after the head's own
final norm, and start from the verifier's state after its final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from specforge.errors import UsageError, nearest_name

# Fields with the number of heads; Qwen3-Next has none, and one head.
COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers")


@dataclass(frozen=True)
class HeadFamily:
    """A family of heads.

    Attributes:
        fusion: Names of the tensors around a head's decoder layer, by the draft's names.
        fusion_prefix: What they begin with; ``{index}`` is the head's number, ``{layer}`` that of the decoder layer
            that it would be in the verifier.
        block_prefix: What the names of the decoder layer's tensors begin with.
        hidden_first: Whether the projection reads the state before the embedding.
        skips_first: Whether the embedding at position 0 is replaced by zeros.
        shares_fusion: Whether all heads use one projection and one set of norms.
        read_as: Model type of transformers that remote code extends, whose layers the heads have; None if the
            verifier's is one of transformers.
    """

    fusion: Mapping[str, str]
    fusion_prefix: str
    block_prefix: str
    hidden_first: bool = False
    skips_first: bool = False
    shares_fusion: bool = False
    read_as: str | None = None


HeadFamilyName = Literal["qwen", "deepseek", "mimo"]

FAMILIES: dict[HeadFamilyName, HeadFamily] = {
    "qwen": HeadFamily(
        fusion={
            "input_proj": "fc",
            "token_layernorm": "pre_fc_norm_embedding",
            "hidden_layernorm": "pre_fc_norm_hidden",
            "final_layernorm": "norm",
        },
        fusion_prefix="mtp.",
        block_prefix="mtp.layers.{index}.",
        shares_fusion=True,
    ),
    "deepseek": HeadFamily(
        fusion={
            "input_proj": "eh_proj",
            "token_layernorm": "enorm",
            "hidden_layernorm": "hnorm",
            "final_layernorm": "shared_head.norm",
        },
        fusion_prefix="model.layers.{layer}.",
        block_prefix="model.layers.{layer}.",
        skips_first=True,
    ),
    "mimo": HeadFamily(
        fusion={name: name for name in ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")},
        fusion_prefix="model.mtp_layers.{index}.",
        block_prefix="model.mtp_layers.{index}.",
        hidden_first=True,
        skips_first=True,
        read_as="qwen2",
    ),
}
FUSION = tuple(FAMILIES["qwen"].fusion)
FAMILY_OF: dict[str, HeadFamilyName] = {
    "qwen3": "qwen",
    "qwen3_next": "qwen",
    "qwen3_5_text": "qwen",
    "qwen3_5_moe_text": "qwen",
    "deepseek_v3": "deepseek",
    "glm4_moe": "deepseek",
    "glm4_moe_lite": "deepseek",
    "mimo": "mimo",
}
"""Family of the heads of verifiers, by model type."""


def family_of(kind: str) -> HeadFamilyName:
    """Return the name of the family of a verifier's heads.

    Args:
        kind: The model type of the verifier's text configuration.

    Raises:
        UsageError: No family is known for it.
    """
    if kind not in FAMILY_OF:
        raise UsageError(
            f"the multi-token-prediction head of {kind!r} verifiers, if there is one, is not known; known: "
            f"{', '.join(FAMILY_OF)}.{nearest_name(kind, FAMILY_OF)} model.draft.fresh true trains a new head"
        )
    return FAMILY_OF[kind]


def stated_heads(verifier: Mapping[str, Any]) -> int | None:
    """Return the number of heads that a verifier's text configuration gives; None if it does not say."""
    found = (verifier.get(name) for name in COUNTS)
    return next((one for one in found if isinstance(one, int) and one > 0), None)
