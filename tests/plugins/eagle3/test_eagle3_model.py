from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge.errors import UsageError
from specforge.models.base_components import draft_layer_config
from specforge_eagle3.config import Eagle3SpeculatorConfig
from specforge_eagle3.model import Eagle3DraftModel

STEPS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "eagle-3.1": {"norm_before_residual": True, "fc_norm": True, "norm_output": True},
    "own embeddings": {"embed_requires_grad": True},
    "two layers": {"num_layers": 2},
    "qwen3": {"layer_type": "qwen3"},
    "qwen3, two layers, all norms": {
        "layer_type": "qwen3",
        "num_layers": 2,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "norm_output": True,
    },
    "five features": {"aux_layer_ids": [0, 1, 3, 5, 8], "fc_norm": True},
}


def make_draft(tiny_verifiers: Mapping[str, Any], seed: int = 0, **options: Any) -> Eagle3DraftModel:
    """A draft with weights large enough to matter, attached, in float64."""
    made = tiny_verifiers["llama"]
    draft = Eagle3DraftModel.from_training_args(made.model.config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.4 * noise)
    draft.attach_verifier(made.folder, "train_only")
    return draft.double()


def make_sliding(draft: Eagle3DraftModel, window: int) -> None:
    layers = draft.config.transformer_layer_config
    layers.layer_types, layers.sliding_window = ["sliding_attention"], window


def random_batch(lengths: list[int], padding: int = 0, features: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths) + padding
    return {
        "input_ids": torch.randint(3, 61, (1, total), generator=generator),
        "aux": torch.randn(1, total, features, 16, generator=generator, dtype=torch.float64),
        "position_ids": torch.cat([*map(torch.arange, lengths), torch.zeros(padding, dtype=torch.int64)])[None],
        "document_ids": torch.cat(
            [*(torch.full((length,), number) for number, length in enumerate(lengths)), torch.full((padding,), -1)]
        )[None],
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_every_trainable_parameter_gets_a_gradient(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    draft = make_draft(tiny_verifiers, **OPTIONS[name])
    batch = random_batch([6, 4], padding=2, features=draft.config.num_aux_layers)
    hidden = draft(**batch, steps=STEPS)
    assert hidden.shape == (STEPS, 1, 12, 16)
    draft.lm_head(hidden)[:, :, :10].square().sum().backward()
    for parameter, tensor in draft.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), parameter
    assert not any(weight.grad is not None for weight in draft.verifier_parts.embed_tokens.parameters())


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_every_norm_option_matters(flag: str, tiny_verifiers: Mapping[str, Any]) -> None:
    batch = random_batch([7])
    plain, other = make_draft(tiny_verifiers), make_draft(tiny_verifiers, **{flag: True})
    other.load_state_dict({**other.state_dict(), **plain.state_dict()})
    with torch.no_grad():
        difference = (plain(**batch, steps=2) - other(**batch, steps=2)).abs().amax(dim=(1, 2, 3))
    assert difference[1] > 1e-3
    # The output norm changes only the input of the next step.
    assert (difference[0] == 0) == (flag == "norm_output")


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"layer_type": "qwen3"}], ids=str)
@pytest.mark.parametrize("index", [0, 1, 4, 7])
def test_rows_never_see_the_future(index: int, options: dict[str, Any], tiny_verifiers: Mapping[str, Any]) -> None:
    """Row t at step k depends on all tokens up to t + 1 + k and all features up to t, and on no others."""
    draft = make_draft(tiny_verifiers, **options)
    batch = random_batch([8])
    with torch.no_grad():
        before = draft(**batch, steps=STEPS)
        tokens = batch["input_ids"].clone()
        tokens[0, index] = (tokens[0, index] + 7) % 61
        other_token = draft(**{**batch, "input_ids": tokens}, steps=STEPS)
        aux = batch["aux"].clone()
        aux[0, index] += 1
        other_feature = draft(**{**batch, "aux": aux}, steps=STEPS)
    for step in range(STEPS):
        for t in range(8):
            token_matters = (other_token[step, 0, t] != before[step, 0, t]).any()
            # A token is read at row index - 1 of step 0 and by all later rows, and at its own row of later steps.
            reads = {index - 1 - earlier for earlier in range(1, step + 1)}
            assert bool(token_matters) == (index > 0 and (t >= index - 1 or t in reads)), ("token", step, t)
            feature_matters = (other_feature[step, 0, t] != before[step, 0, t]).any()
            assert bool(feature_matters) == (t >= index), ("feature", step, t)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("options", [{}, {"layer_type": "qwen3", "norm_output": True}], ids=str)
def test_packed_documents_equal_separate_ones(
    window: int | None, options: dict[str, Any], tiny_verifiers: Mapping[str, Any]
) -> None:
    draft = make_draft(tiny_verifiers, **options)
    if window is not None:
        make_sliding(draft, window)
    lengths = [5, 7, 1, 6]
    batch = random_batch(lengths, padding=3)
    batch["aux"].requires_grad_()
    hidden = draft(**batch, steps=STEPS)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    begin, total = 0, torch.zeros(())
    inside = torch.zeros_like(hidden)
    separate_features = []
    for length in lengths:
        part = slice(begin, begin + length)
        separate = {name: tensor[:, part].detach().clone() for name, tensor in batch.items()}
        separate["aux"].requires_grad_()
        output = draft(**separate, steps=STEPS)
        for step in range(STEPS):
            # Rows that read a token of the same document; the others are never supervised.
            real = max(0, length - 1 - step)
            torch.testing.assert_close(output[step, :, :real], hidden[step, :, part][:, :real])
            inside[step, :, begin : begin + real] = 1
        total = total + (output * (weights * inside)[:, :, part]).sum()
        separate_features.append(separate["aux"])
        begin += length
    parameters = list(draft.parameters())
    packed_gradients = torch.autograd.grad(
        (hidden * weights * inside).sum(), [batch["aux"], *parameters], allow_unused=True
    )
    alone_gradients = torch.autograd.grad(total, [*separate_features, *parameters], allow_unused=True)
    torch.testing.assert_close(packed_gradients[0][:, :begin], torch.cat(alone_gradients[: len(lengths)], dim=1))
    assert not packed_gradients[0][:, begin:].any()
    compared = 0
    for packed, expected in zip(packed_gradients[1:], alone_gradients[len(lengths) :], strict=True):
        if expected is not None:
            torch.testing.assert_close(packed, expected)
            compared += 1
    assert compared >= 10


def test_the_window_matters(tiny_verifiers: Mapping[str, Any]) -> None:
    draft, batch = make_draft(tiny_verifiers), random_batch([8])
    with torch.no_grad():
        full = draft(**batch, steps=1)
        make_sliding(draft, 3)
        near = draft(**batch, steps=1)
    same = (full == near).all(-1)[0, 0]
    assert same.tolist() == [True] * 3 + [False] * 5


def test_features_of_a_later_step_are_the_drafts_own(tiny_verifiers: Mapping[str, Any]) -> None:
    """Gradients reach the first fusion from every step: nothing is detached between steps."""
    draft, batch = make_draft(tiny_verifiers), random_batch([6])
    hidden = draft(**batch, steps=STEPS)
    for step in range(STEPS):
        (gradient,) = torch.autograd.grad(hidden[step, 0, 0].sum(), draft.fc.weight, retain_graph=True)
        assert gradient.any()


def test_from_training_args(tiny_verifiers: Mapping[str, Any]) -> None:
    verifier = tiny_verifiers["llama"].model.config
    t2d = torch.zeros(61, dtype=torch.bool)
    t2d[[2, 5, 60]] = True
    draft = Eagle3DraftModel.from_training_args(
        verifier,
        num_layers=2,
        layer_type="qwen3",
        norm_before_residual=True,
        fc_norm=True,
        norm_output=True,
        t2d=t2d,
        d2t=torch.tensor([2, 4, 58]),
        ttt_steps=4,
        verifier_name_or_path="owner/name",
        intermediate_size=40,
        aux_layer_ids=[1, 4],
    )
    config = draft.config
    assert (config.norm_before_residual, config.norm_before_fc, config.fc_norm) == (True, False, True)
    assert (config.norm_output, config.embed_requires_grad, config.draft_vocab_size) == (True, False, 3)
    assert config.eagle_aux_hidden_state_layer_ids == [1, 4] and config.num_aux_layers == 2
    layers = config.transformer_layer_config
    assert (layers.model_type, layers.num_hidden_layers, layers.intermediate_size) == ("qwen3", 2, 40)
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(layers, name) == getattr(verifier, name)
    assert layers.rope_parameters["rope_theta"] == verifier.rope_parameters["rope_theta"]
    assert config.speculators_config.algorithm == "eagle3"
    assert config.speculators_config.default_proposal_method == "greedy"
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 4
    assert config.speculators_config.verifier.name_or_path == "owner/name"
    assert config.speculators_config.verifier.architectures == ["LlamaForCausalLM"]
    assert draft.draft_ids.tolist() == [2, 5, 60]
    assert torch.equal(draft.t2d, t2d)
    assert draft.lm_head.weight.shape == (3, 16)
    assert draft.fc.weight.shape == (16, 32)


@pytest.mark.parametrize("t2d", [None, torch.ones(61, dtype=torch.bool)], ids=["absent", "all"])
def test_the_whole_vocabulary_needs_no_maps(t2d: Any, tiny_verifiers: Mapping[str, Any]) -> None:
    draft = Eagle3DraftModel.from_training_args(tiny_verifiers["llama"].model.config, t2d=t2d, d2t=None)
    assert draft.draft_ids is None
    assert not {"d2t", "t2d"} & draft.state_dict().keys()
    assert draft.config.draft_vocab_size == 61


def test_offsets_are_derived_when_only_the_mask_is_given(tiny_verifiers: Mapping[str, Any]) -> None:
    t2d = torch.arange(61) % 2 == 1
    draft = Eagle3DraftModel.from_training_args(tiny_verifiers["llama"].model.config, t2d=t2d, d2t=None)
    assert torch.equal(draft.draft_ids, t2d.nonzero().squeeze(1))


def test_training_arguments_of_forward() -> None:
    assert Eagle3DraftModel.get_trainer_kwargs() == ({"steps": 7}, {"steps": 7})
    training, validation = Eagle3DraftModel.get_trainer_kwargs(ttt_steps=3, unknown=1)
    assert training == validation == {"steps": 3}
    training["steps"] = 1
    assert validation == {"steps": 3}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_weights_are_borrowed_from_the_verifier(pruned: bool, own: bool, tiny_verifiers: Mapping[str, Any]) -> None:
    made = tiny_verifiers["llama"]
    t2d = torch.arange(61) % 3 == 0 if pruned else None
    draft = Eagle3DraftModel.from_training_args(made.model.config, t2d=t2d, embed_requires_grad=own)
    draft.attach_verifier(made.folder, "train_only")
    draft.borrow_weights()
    head = made.model.lm_head.weight if t2d is None else made.model.lm_head.weight[t2d]
    assert torch.equal(draft.lm_head.weight, head)
    assert draft.lm_head.weight.requires_grad
    assert (draft.embed_tokens is not None) == own
    embeddings = made.model.model.embed_tokens.weight
    assert torch.equal(draft.embed(torch.arange(61)), embeddings)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.zero_()
    assert torch.equal(made.model.lm_head.weight, draft.verifier_parts.lm_head.weight)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3"])
def test_norm_and_head_start_as_the_verifiers(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    """As functions, not by value: some families scale by 1 + weight."""
    made = tiny_verifiers[name]
    draft = Eagle3DraftModel.from_training_args(made.model.config)
    draft.attach_verifier(made.folder, "train_only")
    draft.borrow_weights()
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    parts = draft.verifier_parts
    torch.testing.assert_close(draft.norm(states), parts.norm(states))
    torch.testing.assert_close(draft.lm_head(draft.norm(states)), parts.lm_head(parts.norm(states)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_draft_layers_fit_the_verifier(name: str, layer_type: str, tiny_verifiers: Mapping[str, Any]) -> None:
    verifier = tiny_verifiers[name].model.config
    layers = draft_layer_config(verifier, layer_type, 1)
    for shared in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(layers, shared) == getattr(verifier, shared)
    assert layers.tie_word_embeddings is False and layers.attention_bias is False
    draft = Eagle3DraftModel.from_training_args(verifier, layer_type=layer_type)
    draft.attach_verifier(tiny_verifiers[name].folder, "train_only")
    batch = random_batch([5])
    assert draft(**{**batch, "aux": batch["aux"].float()}, steps=2).isfinite().all()


def test_contradictions_are_refused() -> None:
    layers = {"model_type": "llama", "vocab_size": 20, "hidden_size": 8, "num_attention_heads": 1}
    Eagle3SpeculatorConfig(transformer_layer_config=layers, draft_vocab_size=20)
    for wrong, message in [
        ({"draft_vocab_size": 21}, "draft_vocab_size 21 exceeds"),
        ({"draft_vocab_size": 0}, "draft_vocab_size"),
        ({"draft_vocab_size": 20, "norm_before_fc": True, "fc_norm": True}, "exclude each other"),
        ({"draft_vocab_size": 20, "norm_output": "sometimes"}, "norm_output"),
        ({"draft_vocab_size": 20, "transformer_layer_config": {"model_type": "lama"}}, "Did you mean 'llama'"),
        ({"draft_vocab_size": 20, "transformer_layer_config": 3}, "transformer_layer_config"),
    ]:
        with pytest.raises(UsageError, match=message):
            Eagle3SpeculatorConfig.from_dict({"transformer_layer_config": layers, **wrong})
