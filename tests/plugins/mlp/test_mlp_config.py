"""The config.json of an MLP speculator, with our names and the deployed ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge import SpeculatorsConfig, VerifierConfig
from specforge.config import SpeculatorModelConfig
from specforge.errors import UsageError
from specforge.models import MLPSpeculatorConfig
from specforge.proposals import GreedyTokenProposalConfig
from specforge_mlp.layout import from_deployed, to_deployed


@st.composite
def deployed(draw: st.DrawFn) -> dict[str, Any]:
    """A deployed configuration with all fields, and some unknown ones."""
    heads = draw(st.integers(1, 8))
    sizes = st.integers(1, 2**17)
    extra = draw(st.dictionaries(st.sampled_from(["transformers_version", "_name_or_path", "remark"]), st.text()))
    return {
        **extra,
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "vocab_size": draw(sizes),
        "emb_dim": draw(sizes),
        "inner_dim": draw(st.just(0) | sizes),
        "n_predict": heads,
        "top_k_tokens_per_head": draw(st.lists(st.integers(1, 9), min_size=heads, max_size=heads)),
        "n_candidates": draw(st.integers(1, 20)),
        "tie_weights": draw(st.booleans()),
        "scale_input": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(values=deployed())
def test_deployed_fields_are_restored_unchanged(values: dict[str, Any]) -> None:
    assert to_deployed(from_deployed(values)) == values


@given(values=deployed())
def test_our_own_file_loses_nothing(values: dict[str, Any]) -> None:
    config = from_deployed(values)
    stored = config.to_dict()
    again = SpeculatorModelConfig.from_dict(stored)
    assert type(again) is MLPSpeculatorConfig and again == config
    assert to_deployed(again) == values
    assert from_deployed(to_deployed(again)) == config


def test_the_meaning_of_each_deployed_field() -> None:
    config = from_deployed(
        {
            "model_type": "mlp_speculator",
            "vocab_size": 100,
            "emb_dim": 48,
            "inner_dim": 0,
            "n_predict": 2,
            "top_k_tokens_per_head": [7, 1],
            "n_candidates": 3,
            "tie_weights": True,
            "scale_input": True,
            "torch_dtype": "bfloat16",
        }
    )
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.state_size) == (100, 48, 0, 48)
    assert (config.num_layers, config.top_k_tokens_per_head, config.n_candidates) == (2, [7, 1], 3)
    assert config.tie_weights and config.inputs_hidden_states_normalized and config.dtype == "bfloat16"
    assert config.model_copy(update={"intermediate_size": 12}).state_size == 12


def test_untied_weights_are_explicit_for_readers_with_another_default() -> None:
    """Transformers assumes true if tie_word_embeddings is missing."""
    assert to_deployed(from_deployed({"model_type": "mlp_speculator"}))["tie_word_embeddings"] is False


def test_the_width_has_two_names() -> None:
    assert from_deployed({"hidden_size": 24, "vocab_size": 9}).hidden_size == 24
    assert to_deployed(from_deployed({"hidden_size": 24}))["emb_dim"] == 24


def test_missing_deployed_fields_have_the_readers_defaults() -> None:
    config = from_deployed({"model_type": "mlp_speculator"})
    assert (config.num_layers, config.top_k_tokens_per_head, config.n_candidates) == (3, [5, 4, 3], 5)
    assert not config.tie_weights and not config.inputs_hidden_states_normalized
    assert (config.hidden_size, config.state_size, config.vocab_size) == (4096, 4096, 32000)


def test_defaults_of_the_interface() -> None:
    config = MLPSpeculatorConfig()
    assert config.speculators_model_type == "mlp" and config.architectures == ["MLPSpeculator"]
    assert config.inputs == ["input_embeddings", "hidden_states[-1]"]
    assert config.inputs_hidden_states_normalized is False and config.tie_weights is True
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 4096, 128256)
    assert config.num_layers == 5 and config.top_k_tokens_per_head == [5, 4, 3, 2, 1]
    assert MLPSpeculatorConfig(num_layers=7).top_k_tokens_per_head == [5, 4, 3, 2, 1, 1, 1]


def test_example_of_the_configuration() -> None:
    """As in the documentation of speculators, where it cannot be run."""
    config = MLPSpeculatorConfig(
        hidden_size=16,
        intermediate_size=12,
        vocab_size=61,
        num_layers=3,
        torch_dtype="torch.bfloat16",
        speculators_config=SpeculatorsConfig(
            algorithm="mlp",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="owner/name", architectures=["LlamaForCausalLM"]),
        ),
    )
    assert config.dtype == "bfloat16"
    assert MLPSpeculatorConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": ["hidden_states[-1]"]}, r"inputs: must be .*input_embeddings.*nothing else is supported"),
        ({"inputs": ["input_embeddings", "hidden_states[-2]"]}, "inputs: must be"),
        ({"num_layers": 3, "top_k_tokens_per_head": [5, 4]}, "one number for each of the 3 heads, not 2"),
        ({"num_layers": 2, "top_k_tokens_per_head": [5, 0]}, r"top_k_tokens_per_head\.1"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": "many"}, "num_layers"),
        ({"n_candidates": 0}, "n_candidates"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"speculators_model_type": "eagle"}, "speculators_model_type is 'eagle'"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"somewhere: .*{message}"):
        MLPSpeculatorConfig.from_dict(values, "somewhere")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type is not 'mlp_speculator'"),
        ({"n_predict": 4, "top_k_tokens_per_head": [5, 4, 3]}, "one number for each of the 4 heads, not 3"),
        ({"emb_dim": "wide"}, "hidden_size"),
        ({"intermediate_size": 8, "inner_dim": 9}, "intermediate_size is 8 and inner_dim 9"),
    ],
)
def test_wrong_deployed_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"somewhere: .*{message}"):
        from_deployed(values, "somewhere")
