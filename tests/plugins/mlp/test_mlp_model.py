"""The network against its equations, and its two layouts on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import read, write
from mlp_drafts import OPTIONS, random_draft, slow_heads
from random_verifiers import VOCABULARY, WIDTH, last_only, random_rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from specforge import SpeculatorModel
from specforge.errors import UsageError
from specforge.models import MLPSpeculator
from specforge_mlp.config import MLPSpeculatorConfig
from specforge_mlp.layout import from_deployed

LAYOUT = "mlp/mlp_speculator"
VerifierOf = Callable[[str], PreTrainedModel]


def make_config(**changes: Any) -> MLPSpeculatorConfig:
    values = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": VOCABULARY, "num_layers": 3, **changes}
    return MLPSpeculatorConfig(**values)


def assert_as_in_the_equations(
    draft: MLPSpeculator, weights: Mapping[str, Tensor], tokens: Tensor, states: Tensor
) -> None:
    """Compare forward() at every row of a batch; entry i of the tokens holds x_{i+1}."""
    heads, (batch, length) = draft.config.num_layers, states.shape[:2]
    logits = draft(tokens, states)
    assert logits.shape == (heads, batch, length, draft.config.vocab_size)
    for row in range(batch):
        for t in range(length):
            read_tokens = tokens[row, t : t + heads].tolist()
            expected = torch.stack(slow_heads(weights, draft.config, states[row, t], read_tokens))
            torch.testing.assert_close(logits[:, row, t], expected, atol=1e-10, rtol=1e-9)


@settings(max_examples=40)
@given(
    heads=st.integers(1, 5),
    tied=st.booleans(),
    scaled=st.booleans(),
    inner=st.sampled_from([0, 5, 11]),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_logits_are_those_of_the_equations(heads: int, tied: bool, scaled: bool, inner: int, seed: int) -> None:
    config = make_config(
        num_layers=heads, tie_weights=tied, inputs_hidden_states_normalized=scaled, intermediate_size=inner
    )
    draft = MLPSpeculator(config).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    tokens, states = random_rows(2, 3 + heads - 1, seed, width=8)
    assert_as_in_the_equations(draft, draft.state_dict(), tokens, states[:, :3])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_unrolling_reads_the_last_state_after_the_final_norm(family: str, name: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    draft = random_draft(verifier, num_layers=3, **OPTIONS[name])
    tokens, last = random_rows(2, 7)
    # Neither positions nor documents are read.
    nothing = torch.full_like(tokens, -7)
    for steps in (1, 2, 3):
        hidden = draft.unroll(tokens, last_only(last), nothing, nothing, steps)
        assert hidden.shape == (steps, 2, 7, draft.config.state_size)
        for row in range(2):
            for t in range(7 - steps):
                state = verifier.model.norm(last)[row, t]
                following = tokens[row, t + 1 : t + 1 + steps].tolist()
                expected = slow_heads(draft.state_dict(), draft.config, state, following)
                for step in range(steps):
                    torch.testing.assert_close(draft.logits(hidden[step, row, t], step), expected[step])


def test_more_steps_than_heads_are_refused(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), num_layers=2)
    tokens, last = random_rows(1, 6)
    with pytest.raises(UsageError, match="this draft has 2 heads, but 3 steps are requested"):
        draft.unroll(tokens, last_only(last), tokens, tokens, 3)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    draft = MLPSpeculator(make_config(hidden_size=120, intermediate_size=200, vocab_size=300, tie_weights=False))
    for name, parameter in draft.state_dict().items():
        if name.startswith("ln"):
            assert bool((parameter == (0 if name.endswith("bias") else 1)).all()), name
        else:
            assert float(parameter.std()) == pytest.approx(200**-0.5, rel=0.02), name
            assert abs(float(parameter.mean())) < 0.002, name


# Released drafts, at small widths: their config.json, and the names and shapes of their tensors.
V, H, W = 23, 8, 6
RELEASED: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "Llama-3-8B": (
        {"n_predict": 4, "emb_dim": H, "inner_dim": W, "top_k_tokens_per_head": [4, 3, 2, 2]},
        {
            **{f"emb.{i}.weight": [V, W] for i in range(4)},
            **{f"proj.{i}.weight": [W, W if i else H] for i in range(4)},
            **{f"head.{i}.weight": [V, W] for i in range(4)},
            **{f"ln.{i}.{part}": [W] for i in range(4) for part in ("weight", "bias")},
        },
    ),
    "Granite-34B-code": (
        {"n_predict": 5, "emb_dim": H, "inner_dim": W, "tie_weights": True, "scale_input": True},
        {
            "emb.0.weight": [V, W],
            "proj.0.weight": [W, H],
            "proj.1.weight": [W, W],
            "head.0.weight": [V, W],
            "ln.0.weight": [W],
            "ln.0.bias": [W],
        },
    ),
}


def publish(folder: Path, name: str, copies: bool = False) -> dict[str, Tensor]:
    """Write random weights under the published names; return the weights for the equations."""
    values, shapes = RELEASED[name]
    generator = torch.Generator().manual_seed(3)
    weights = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    stored = dict(weights)
    if copies:
        for head in range(1, values["n_predict"]):
            for kind, part in (("emb", "weight"), ("head", "weight"), ("ln", "weight"), ("ln", "bias")):
                stored[f"{kind}.{head}.{part}"] = weights[f"{kind}.0.{part}"].clone()
            stored[f"proj.{head}.weight"] = weights["proj.1.weight"].clone()
    folder.mkdir(exist_ok=True)
    save_file({f"speculator.{key}": tensor for key, tensor in stored.items()}, folder / "model.safetensors")
    config = {"model_type": "mlp_speculator", "vocab_size": V, "torch_dtype": "float64", "remark": "kept", **values}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def change(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace tensors of a checkpoint; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_released_drafts_are_read(name: str, tmp_path: Path) -> None:
    weights = publish(tmp_path, name)
    draft = read(LAYOUT, tmp_path, None)
    assert sum(parameter.numel() for parameter in draft.parameters()) == sum(
        weight.numel() for weight in weights.values()
    )
    tokens = torch.randint(V, (1, 8), generator=torch.Generator().manual_seed(0))
    states = random_rows(1, 3, width=H)[1]
    assert_as_in_the_equations(draft, weights, tokens, states)


@pytest.mark.parametrize("name", RELEASED)
def test_written_as_released(name: str, tmp_path: Path) -> None:
    publish(tmp_path / "theirs", name)
    write(LAYOUT, read(LAYOUT, tmp_path / "theirs", None), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["architectures"] == ["MLPSpeculatorPreTrainedModel"] and stored["remark"] == "kept"
    assert stored["dtype"] == "float64" and len(stored["top_k_tokens_per_head"]) == stored["n_predict"]
    assert {key: stored[key] for key in RELEASED[name][0]} == RELEASED[name][0]


@torch.no_grad()
def test_a_tied_file_may_repeat_what_is_shared(tmp_path: Path) -> None:
    weights = publish(tmp_path, "Granite-34B-code", copies=True)
    assert len(load_file(tmp_path / "model.safetensors")) == 5 * 5
    draft = read(LAYOUT, tmp_path, None)
    assert sorted(draft.state_dict()) == sorted(weights)
    tokens = torch.randint(V, (1, 8), generator=torch.Generator().manual_seed(0))
    assert_as_in_the_equations(draft, weights, tokens, random_rows(1, 3, width=H)[1])


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("emb.3.weight", "emb.0.weight"),
        ("proj.2.weight", "proj.1.weight"),
        ("head.1.weight", "head.0.weight"),
        ("ln.4.bias", "ln.0.bias"),
    ],
)
def test_a_copy_that_differs_is_named(name: str, original: str, tmp_path: Path) -> None:
    weights = publish(tmp_path, "Granite-34B-code", copies=True)
    change(tmp_path, {f"speculator.{name}": weights[original] + 1e-9})
    with pytest.raises(UsageError, match=f"tie_weights is set in config.json, but {name} differs from {original}"):
        read(LAYOUT, tmp_path, None)


@pytest.mark.parametrize("draft", RELEASED)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.0.weight": None}, "missing: head.0.weight"),
        ({"ln.0.bias": None}, "missing: ln.0.bias"),
        ({"ln0.weight": torch.ones(W)}, "unknown: ln0.weight"),
        ({"emb.x.weight": torch.ones(W)}, "unknown: emb.x.weight"),
        ({"proj.0.weight": torch.ones(W, H + 1)}, f"proj.0.weight is [{W}, {H + 1}], not [{W}, {H}]"),
    ],
    ids=["missing matrix", "missing bias", "unknown norm", "unknown number", "shape"],
)
def test_mismatching_tensors_are_named(
    draft: str, changes: Mapping[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    publish(tmp_path, draft)
    change(tmp_path, {f"speculator.{name}": tensor for name, tensor in changes.items()})
    with pytest.raises(UsageError, match=re.escape(str(tmp_path)) + ".*" + re.escape(message)):
        read(LAYOUT, tmp_path, None)


def test_a_copy_for_a_missing_head_is_unknown(tmp_path: Path) -> None:
    weights = publish(tmp_path, "Granite-34B-code", copies=True)
    change(tmp_path, {"speculator.emb.5.weight": weights["emb.0.weight"].clone()})
    with pytest.raises(UsageError, match=r"unknown: emb\.5\.weight"):
        read(LAYOUT, tmp_path, None)


def test_a_tensor_without_the_prefix_is_unknown(tmp_path: Path) -> None:
    """It must not replace the tensor with the prefix."""
    weights = publish(tmp_path, "Llama-3-8B")
    change(tmp_path, {"emb.0.weight": torch.zeros_like(weights["emb.0.weight"])})
    with pytest.raises(UsageError, match=r"emb\.0\.weight"):
        read(LAYOUT, tmp_path, None)


def test_untied_weights_are_not_copies(tmp_path: Path) -> None:
    """With a config.json that does not tie weights, the same tensors are those of five heads."""
    publish(tmp_path, "Granite-34B-code", copies=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_weights": False}))
    assert len(read(LAYOUT, tmp_path, None).state_dict()) == 5 * 5


def test_the_verifier_is_stored(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    publish(tmp_path, "Llama-3-8B")
    folder = str(tiny_verifiers["llama"].folder)
    speculators = read(LAYOUT, tmp_path, folder).config.speculators_config
    assert speculators.verifier.name_or_path == folder
    assert speculators.verifier.architectures == ["LlamaForCausalLM"]
    chain, tree = speculators.proposal_methods
    assert (speculators.default_proposal_method, chain.speculative_tokens) == ("greedy", 4)
    assert (tree.proposal_type, tree.top_k_tokens_per_head, tree.n_candidates) == ("candidate_tree", [4, 3, 2, 2], 5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    publish(tmp_path, "Llama-3-8B")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        read(LAYOUT, tmp_path, None)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(name: str, dtype: torch.dtype, verifier_of: VerifierOf, tmp_path: Path) -> None:
    draft = random_draft(verifier_of("llama"), **OPTIONS[name]).to(dtype)
    draft.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["speculators_model_type"] == "mlp" and "model_type" not in stored
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert type(again) is MLPSpeculator and again.config == draft.config and again.verifier is None
    assert again.state_dict().keys() == draft.state_dict().keys()
    for tensor, own in zip(again.state_dict().values(), draft.state_dict().values(), strict=True):
        assert tensor.dtype == dtype and torch.equal(tensor, own)


@pytest.mark.parametrize(
    ("size", "message"),
    [({"hidden_size": WIDTH + 1}, "a width of 17, not 16"), ({"vocab_size": 40}, "a vocabulary of 40, not 31")],
)
def test_another_verifier_is_refused(size: dict[str, int], message: str, verifier_of: VerifierOf) -> None:
    draft = MLPSpeculator(make_config(**{"hidden_size": WIDTH, "vocab_size": VOCABULARY, **size}))
    with pytest.raises(UsageError, match=message):
        draft.attach_verifier(verifier_of("llama"))
    assert draft.verifier is None
    with pytest.raises(ValueError, match="no verifier is attached"):
        _ = draft.verifier_parts


def test_attaching_while_creating(tiny_verifiers: Mapping[str, Any]) -> None:
    folder = str(tiny_verifiers["llama"].folder)
    config = make_config(hidden_size=16, vocab_size=61)
    assert MLPSpeculator(config, verifier=folder).verifier is not None
    parts = MLPSpeculator(config, verifier=folder, verifier_attachment_mode="train_only")
    assert parts.verifier is None and parts.verifier_parts.config.hidden_size == 16
    detached = MLPSpeculator(config, verifier=folder, verifier_attachment_mode="detached")
    with pytest.raises(ValueError, match="no verifier is attached"):
        _ = detached.verifier_parts


def test_the_sizes_are_the_verifiers(verifier_of: VerifierOf) -> None:
    draft = MLPSpeculator.from_training_args(verifier_of("qwen3").config, num_layers=2, top_k_tokens_per_head=[9, 2])
    config = draft.config
    assert (config.hidden_size, config.vocab_size, config.state_size) == (WIDTH, VOCABULARY, WIDTH)
    assert config.tie_weights and config.inputs_hidden_states_normalized and config.top_k_tokens_per_head == [9, 2]
    assert draft.aux_layers == [] and draft.draft_ids is None
    assert from_deployed({"n_predict": 2}).tie_weights is False
