"""The task of every contestant: a verifier, a draft, and one batch with the verifier's states.

A task is a folder: ``verifier`` holds a configuration and the token embeddings, final norm and head; ``task.json`` the
settings below; ``task.safetensors`` the draft's weights by the names of the ``speculators`` layout, and the batch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import torch
from drafting import Drafting
from safetensors.torch import load_file, save_file
from torch import Tensor

AUX_LAYERS = (2, 4, 5)
# The decay of the draft steps' losses in the paper and in two of the three packages.
STEP_DECAY = 0.8
DRAFT = "draft."


@dataclass(frozen=True)
class Task(Drafting):
    """Sizes and folder of a task.

    Attributes:
        folder: Folder of the task.
        hidden: Width H of verifier and draft.
        vocabulary: Size V of the verifier's vocabulary.
        draft_vocabulary: Size D of the draft's vocabulary.
        length: Tokens T of the one document that is the batch.
        steps: Draft steps of training-time test.
        supervised: Share of the response, at the document's end.
        denominator: Divisor of a step's loss: the number of its supervised rows (``valid``) or of ``all`` rows. The
            packages differ; ours supports both.
    """

    folder: str
    hidden: int
    vocabulary: int
    draft_vocabulary: int
    length: int
    steps: int
    supervised: float
    denominator: str = "valid"
    aux_layers: ClassVar[tuple[int, ...]] = AUX_LAYERS

    @property
    def intermediate(self) -> int:
        """Width of the draft's MLP, in Llama-3.1-8B's proportion."""
        return self.hidden * 7 // 2

    @property
    def heads(self) -> int:
        """Attention heads of width 64; four share a key-value head, as in Llama-3.1-8B."""
        return self.hidden // 64

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The draft's weights, each under ``draft.``, and the batch.

        * ``input_ids`` int64 [T];
        * ``aux`` [T, 3, H] and ``last`` [T, H], the verifier's states, the latter before its final norm;
        * ``counts`` bool [T]: whether a draft step is trained on the verifier's state of that token;
        * ``draft_ids`` int64 [D], ascending: the verifier's ids of the draft's tokens.
        """
        return load_file(Path(self.folder) / "task.safetensors")

    @property
    def draft(self) -> dict[str, Tensor]:
        """The draft's weights by their names."""
        return {name.removeprefix(DRAFT): tensor for name, tensor in self.tensors.items() if name.startswith(DRAFT)}

    @property
    def draft_ids(self) -> Tensor:
        """The verifier's ids of the draft's tokens, int64 [D], ascending."""
        return self.tensors["draft_ids"]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a task."""
        return cls(**json.loads((folder / "task.json").read_text()))

    def write(self) -> None:
        """Make the task's folder, with random weights and states."""
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int, deviation: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=random) * deviation

        def norm() -> Tensor:
            return 1 + normal(self.hidden, deviation=0.1)

        def linear(outputs: int, inputs: int) -> Tensor:
            return normal(outputs, inputs, deviation=inputs**-0.5)

        width, key_value = self.hidden, self.heads // 4 * 64
        draft_ids = torch.randperm(self.vocabulary, generator=random)[: self.draft_vocabulary].sort().values
        head = 3 * linear(self.vocabulary, width)
        # The most probable token is always in the draft vocabulary, since packages treat others differently.
        head.mul_(0.2).index_copy_(0, draft_ids, head[draft_ids] * 5)
        self.write_verifier(self._verifier_config(), normal(self.vocabulary, width), norm(), head)
        layer = "layers.0."
        draft = {
            "fc.weight": linear(width, 3 * width),
            f"{layer}input_layernorm.weight": norm(),
            f"{layer}hidden_norm.weight": norm(),
            f"{layer}post_attention_layernorm.weight": norm(),
            f"{layer}self_attn.q_proj.weight": linear(width, 2 * width),
            f"{layer}self_attn.k_proj.weight": linear(key_value, 2 * width),
            f"{layer}self_attn.v_proj.weight": linear(key_value, 2 * width),
            f"{layer}self_attn.o_proj.weight": linear(width, width),
            f"{layer}mlp.gate_proj.weight": linear(self.intermediate, width),
            f"{layer}mlp.up_proj.weight": linear(self.intermediate, width),
            f"{layer}mlp.down_proj.weight": linear(width, self.intermediate),
            "norm.weight": norm(),
            "lm_head.weight": linear(self.draft_vocabulary, width),
        }
        # There is no state before token 0, so no row is trained on its state.
        first = max(1, self.length - round(self.supervised * self.length))
        batch = {
            "input_ids": torch.randint(self.vocabulary, (self.length,), generator=random),
            "aux": normal(self.length, len(AUX_LAYERS), width),
            "last": normal(self.length, width),
            "counts": torch.arange(self.length) >= first,
            "draft_ids": draft_ids,
        }
        save_file(
            {**{DRAFT + name: tensor for name, tensor in draft.items()}, **batch}, f"{self.folder}/task.safetensors"
        )
        self.write_settings()

    def write_settings(self) -> None:
        """Write only the settings."""
        (Path(self.folder) / "task.json").write_text(json.dumps(asdict(self)))

    def _verifier_config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 8,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 4,
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2 * self.length,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
