"""A checkpoint's ``config.json``: allowed values, unknown fields, and error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LlamaConfig, Qwen3Config

from specforge import SpeculatorModelConfig, SpeculatorsConfig, TokenProposalConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models import Eagle3SpeculatorConfig
from specforge.proposals import GreedyTokenProposalConfig

LAYERS = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}
SPECULATORS: dict[str, Any] = {
    "algorithm": "eagle3",
    "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
    "default_proposal_method": "greedy",
    "verifier": {"name_or_path": "owner/name", "architectures": ["LlamaForCausalLM"]},
}
COMPLETE: dict[str, Any] = {
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 32,
    "transformer_layer_config": LAYERS,
    "speculators_config": SPECULATORS,
}

# A checkpoint's JSON file holds no NaN and no integers beyond 64 bits.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
# A prefix, so that no name equals a known field or starts with pydantic's own "model_".
EXTRAS = st.dictionaries(st.text("abcdefgh_", min_size=1).map("x_".__add__), JSON, max_size=4)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a ``config.json`` with the given text and return its folder."""

    def write(text: str) -> Path:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def changed(**values: Any) -> dict[str, Any]:
    """Return a valid configuration with some values replaced."""
    return {**json.loads(json.dumps(COMPLETE)), **values}


class TestImports:
    def test_names_of_the_package(self):
        import specforge
        from specforge import models, proposals

        assert specforge.SpeculatorsConfig is SpeculatorsConfig
        assert specforge.VerifierConfig is VerifierConfig
        assert models.Eagle3SpeculatorConfig.__module__ == "specforge_eagle3.config"
        assert models.Eagle3DraftModel.config_class is Eagle3SpeculatorConfig
        assert specforge.SpeculatorModel in models.Eagle3DraftModel.__mro__
        assert proposals.GreedyTokenProposalConfig is GreedyTokenProposalConfig
        assert set(specforge.__all__) <= {name for name in specforge.__all__ if getattr(specforge, name)}
        assert set(dir(specforge)) == {*specforge.__all__, "__version__"}

    def test_from_import_statements(self):
        scope: dict[str, Any] = {}
        exec(
            "from specforge import SpeculatorsConfig, VerifierConfig\n"
            "from specforge.models import Eagle3DraftModel, Eagle3SpeculatorConfig\n"
            "from specforge.proposals import GreedyTokenProposalConfig\n",
            scope,
        )
        assert scope["Eagle3DraftModel"].__name__ == "Eagle3DraftModel"

    def test_unknown_names_are_attribute_errors_with_the_nearest(self):
        import specforge
        from specforge import models

        with pytest.raises(AttributeError, match="no attribute 'SpeculatorConfigs'"):
            _ = specforge.SpeculatorConfigs
        with pytest.raises(AttributeError, match="Did you mean 'Eagle3DraftModel'"):
            _ = models.Eagle3DraftModle
        with pytest.raises(ImportError):
            exec("from specforge.models import Nothing", {})
        assert not hasattr(models, "__path_of_nothing__")


class TestVerifierConfig:
    def test_from_config_takes_names_from_the_configuration(self):
        config = LlamaConfig(architectures=["LlamaForCausalLM"], name_or_path="owner/name")
        described = VerifierConfig.from_config(config)
        assert (described.name_or_path, described.architectures) == ("owner/name", ["LlamaForCausalLM"])

    def test_from_config_prefers_the_given_name(self):
        config = LlamaConfig(name_or_path="somewhere")
        assert VerifierConfig.from_config(config, "owner/other").name_or_path == "owner/other"

    def test_from_config_without_names(self):
        described = VerifierConfig.from_config(LlamaConfig())
        assert (described.name_or_path, described.architectures) == (None, [])

    @pytest.mark.parametrize("as_text", [True, False])
    def test_from_pretrained_reads_a_folder(self, tmp_path, as_text):
        Qwen3Config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
        described = VerifierConfig.from_pretrained(str(tmp_path) if as_text else tmp_path)
        assert described.name_or_path == str(tmp_path)
        assert described.architectures == ["Qwen3ForCausalLM"]

    def test_changes_are_checked(self):
        described = VerifierConfig()
        with pytest.raises(ValidationError, match="architectures"):
            described.architectures = "LlamaForCausalLM"


class TestGreedy:
    def test_defaults(self):
        proposal = GreedyTokenProposalConfig()
        assert proposal.model_dump() == {
            "proposal_type": "greedy",
            "speculative_tokens": 5,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("speculative_tokens", 0),
            ("speculative_tokens", -1),
            ("speculative_tokens", 1.5),
            ("verifier_accept_k", 0),
            ("accept_tolerance", -0.1),
            ("proposal_type", "tree"),
        ],
    )
    def test_bounds(self, name, value):
        with pytest.raises(ValidationError, match=name):
            GreedyTokenProposalConfig(**{name: value})
        proposal = GreedyTokenProposalConfig()
        with pytest.raises(ValidationError, match=name):
            setattr(proposal, name, value)

    def test_lowest_allowed(self):
        GreedyTokenProposalConfig(speculative_tokens=1, verifier_accept_k=1, accept_tolerance=0)


class TestSpeculatorsConfig:
    def test_typed_from_plain_values(self):
        config = SpeculatorsConfig(**SPECULATORS)
        assert isinstance(config.proposal_methods[0], GreedyTokenProposalConfig)
        assert config.proposal_methods[0].speculative_tokens == 3
        assert isinstance(config.verifier, VerifierConfig)

    def test_from_objects(self):
        config = SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=4)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="x"),
        )
        assert config.model_dump()["proposal_methods"][0]["speculative_tokens"] == 4

    def test_default_must_be_listed(self):
        with pytest.raises(ValidationError, match=r"default_proposal_method 'tree' is not one of \['greedy'\]"):
            SpeculatorsConfig(**{**SPECULATORS, "default_proposal_method": "tree"})

    def test_default_of_an_empty_list(self):
        with pytest.raises(ValidationError, match="default_proposal_method"):
            SpeculatorsConfig(**{**SPECULATORS, "proposal_methods": []})

    @pytest.mark.parametrize("missing", sorted(SPECULATORS))
    def test_every_field_is_required(self, missing):
        with pytest.raises(ValidationError, match=missing):
            SpeculatorsConfig(**{name: value for name, value in SPECULATORS.items() if name != missing})

    @pytest.mark.parametrize("methods", [3, "greedy", ["greedy"], [{}], [{"proposal_type": 3}], None, {"a": 1}])
    def test_malformed_proposal_methods(self, methods):
        with pytest.raises(ValidationError, match="proposal_methods"):
            SpeculatorsConfig(**{**SPECULATORS, "proposal_methods": methods})

    @given(extras=EXTRAS)
    def test_methods_of_other_tools_are_kept(self, extras):
        method = {"proposal_type": "sampled_tree", **extras}
        values = {**SPECULATORS, "proposal_methods": [method], "default_proposal_method": "sampled_tree"}
        config = SpeculatorsConfig(**values)
        assert type(config.proposal_methods[0]) is TokenProposalConfig
        assert config.model_dump(mode="json")["proposal_methods"] == [method]


class TestRoundTrip:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example overwrites the file
    @given(top=EXTRAS, inner=EXTRAS, verifier=EXTRAS, proposal=EXTRAS)
    def test_unknown_fields_are_kept_everywhere(self, tmp_path, top, inner, verifier, proposal):
        values = changed(**top)
        values["speculators_config"].update(inner)
        values["speculators_config"]["verifier"].update(verifier)
        values["speculators_config"]["proposal_methods"][0].update(proposal)
        Eagle3SpeculatorConfig.from_dict(values).save_pretrained(tmp_path)
        again = SpeculatorModelConfig.from_pretrained(tmp_path)
        stored = again.to_dict()
        assert {name: stored[name] for name in top} == top
        stored = stored["speculators_config"]
        assert {name: stored[name] for name in inner} == inner
        assert {name: stored["verifier"][name] for name in verifier} == verifier
        assert {name: stored["proposal_methods"][0][name] for name in proposal} == proposal

    def test_saving_twice_writes_the_same_bytes(self, tmp_path):
        Eagle3SpeculatorConfig.from_dict(changed(note="ü — ∑")).save_pretrained(tmp_path / "one")
        SpeculatorModelConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
        first, second = ((tmp_path / name / "config.json").read_bytes() for name in ("one", "two"))
        assert first == second and first.endswith(b"}\n")

    def test_saving_leaves_no_other_files(self, tmp_path):
        Eagle3SpeculatorConfig.from_dict(COMPLETE).save_pretrained(tmp_path / "a" / "b")
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]

    def test_the_given_values_are_not_changed(self):
        values = changed()
        del values["speculators_model_type"]
        before = json.dumps(values)
        Eagle3SpeculatorConfig.from_dict(values)
        assert json.dumps(values) == before

    def test_constructor_does_not_change_a_given_dict(self):
        values = {"draft_vocab_size": 32, "transformer_layer_config": dict(LAYERS)}
        Eagle3SpeculatorConfig.model_validate(values)
        assert "speculators_model_type" not in values


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("{", ["is not valid JSON"]),
            ("", ["is not valid JSON"]),
            ("\x00\x01", ["is not valid JSON"]),
            ("[1, 2]", ["must hold a JSON object", "list"]),
            ("null", ["must hold a JSON object"]),
            ('"eagle3"', ["must hold a JSON object", "str"]),
            ("{}", ["speculators_model_type is missing"]),
            ('{"model_type": "llama"}', ["speculators_model_type is missing"]),
            ('{"speculators_model_type": 3}', ["speculators_model_type"]),
            ('{"speculators_model_type": "eagl3"}', ["'eagl3'", "Did you mean 'eagle3'?"]),
        ],
    )
    def test_a_file_that_is_not_a_configuration(self, file, text, parts):
        folder = file(text)
        with pytest.raises(UsageError) as caught:
            SpeculatorModelConfig.from_pretrained(folder)
        for part in [str(folder / "config.json"), *parts]:
            assert part in str(caught.value)

    def test_a_binary_file(self, tmp_path):
        (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError, match=r"config\.json"):
            SpeculatorModelConfig.from_pretrained(tmp_path)

    def test_a_folder_without_the_file(self, tmp_path):
        with pytest.raises(UsageError, match=r"holds no config\.json"):
            SpeculatorModelConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "../x"])
    def test_neither_folder_nor_hub_id(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # beside which there may be a folder x
        with pytest.raises(UsageError, match="is not a folder"):
            SpeculatorModelConfig.from_pretrained(name)

    @pytest.mark.parametrize(
        ("values", "key", "value"),
        [
            ({"draft_vocab_size": 0}, "draft_vocab_size", "0"),
            ({"draft_vocab_size": "many"}, "draft_vocab_size", "'many'"),
            ({"draft_vocab_size": 65}, "draft_vocab_size 65 exceeds", "64"),
            ({"norm_before_residual": "perhaps"}, "norm_before_residual", "'perhaps'"),
            ({"target_hidden_size": -1}, "target_hidden_size", "-1"),
            ({"eagle_aux_hidden_state_layer_ids": "2,4,5"}, "eagle_aux_hidden_state_layer_ids", "'2,4,5'"),
            ({"eagle_aux_hidden_state_layer_ids": [2, "x"]}, "eagle_aux_hidden_state_layer_ids.1", "'x'"),
            ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc", "exclude each other"),
            ({"transformer_layer_config": 3}, "transformer_layer_config", "must be a dict"),
            ({"transformer_layer_config": [1]}, "transformer_layer_config", "must be a dict"),
            ({"transformer_layer_config": None}, "transformer_layer_config", "must be a dict"),
            ({"transformer_layer_config": {"model_type": "lama"}}, "transformer_layer_config", "'lama'"),
            ({"speculators_config": 3}, "speculators_config", "3"),
            (
                {"speculators_config": {**SPECULATORS, "default_proposal_method": "tree"}},
                "speculators_config",
                "'tree' is not one of",
            ),
            (
                {
                    "speculators_config": {
                        **SPECULATORS,
                        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 0}],
                    }
                },
                "speculative_tokens",
                "0",
            ),
            (
                {"speculators_config": {**SPECULATORS, "verifier": {"architectures": "x"}}},
                "speculators_config.verifier.architectures",
                "'x'",
            ),
        ],
    )
    def test_a_wrong_field_is_named_with_file_and_value(self, file, values, key, value):
        folder = file(json.dumps(changed(**values)))
        with pytest.raises(UsageError) as caught:
            SpeculatorModelConfig.from_pretrained(folder)
        message = str(caught.value)
        assert message.startswith(f"{folder / 'config.json'}: ")
        assert key in message and value in message

    def test_a_configuration_of_another_type(self):
        with pytest.raises(UsageError, match="speculators_model_type is 'medusa', but Eagle3SpeculatorConfig is"):
            Eagle3SpeculatorConfig.from_dict(changed(speculators_model_type="medusa"))


class TestEagle3:
    def test_layers_as_dict_or_object(self):
        by_dict = Eagle3SpeculatorConfig(draft_vocab_size=32, transformer_layer_config=LAYERS)
        by_object = Eagle3SpeculatorConfig(draft_vocab_size=32, transformer_layer_config=LlamaConfig(**LAYERS))
        assert isinstance(by_dict.transformer_layer_config, LlamaConfig)
        assert by_dict.to_dict() == by_object.to_dict()
        assert by_dict.target_vocab_size == 64

    def test_layers_of_another_family(self):
        config = Eagle3SpeculatorConfig(
            draft_vocab_size=32, transformer_layer_config={**LAYERS, "model_type": "qwen3", "head_dim": 8}
        )
        assert isinstance(config.transformer_layer_config, Qwen3Config)
        assert config.to_dict()["transformer_layer_config"]["model_type"] == "qwen3"

    @pytest.mark.parametrize("value", ["llama", 7, [LAYERS], object()])
    def test_layers_of_anything_else(self, value):
        with pytest.raises(ValidationError, match="must be a dict or a transformers configuration"):
            Eagle3SpeculatorConfig(draft_vocab_size=32, transformer_layer_config=value)

    @pytest.mark.parametrize("value", [True, False])
    def test_stored_layout(self, tmp_path, value):
        Eagle3SpeculatorConfig(
            draft_vocab_size=32, transformer_layer_config=LAYERS, norm_before_residual=value
        ).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert "model_type" not in stored  # transformers would treat the folder as one of its models
        assert stored["speculators_model_type"] == "eagle3"
        assert stored["architectures"] == ["Eagle3DraftModel"]
        assert stored["norm_before_residual"] is value
        assert stored["transformer_layer_config"]["model_type"] == "llama"
        assert stored["tie_word_embeddings"] is False
        assert "_name_or_path" not in stored["transformer_layer_config"]

    def test_defaults_of_the_speculators_library(self):
        config = Eagle3SpeculatorConfig()
        assert config.draft_vocab_size == 32000
        assert config.norm_before_residual is False
        assert config.eagle_aux_hidden_state_layer_ids is None and config.num_aux_layers == 3

    def test_every_layer_setting_survives(self, tmp_path):
        layers = LlamaConfig(
            **LAYERS,
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
            rms_norm_eps=1e-4,
            num_key_value_heads=1,
        )  # fmt: skip
        Eagle3SpeculatorConfig(draft_vocab_size=32, transformer_layer_config=layers).save_pretrained(tmp_path)
        again = Eagle3SpeculatorConfig.from_pretrained(tmp_path).transformer_layer_config
        assert again.rope_parameters == layers.rope_parameters
        assert (again.rms_norm_eps, again.num_key_value_heads) == (1e-4, 1)


class TestHub:
    def test_a_hub_id_goes_through_the_hub_client(self, file, monkeypatch):
        folder = file(json.dumps(COMPLETE))
        asked = []

        def download(repository: str, name: str, **options: Any) -> str:
            asked.append((repository, name, options))
            return str(folder / name)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        config = SpeculatorModelConfig.from_pretrained("owner/draft", revision="v2")
        assert isinstance(config, Eagle3SpeculatorConfig)
        assert asked == [("owner/draft", "config.json", {"revision": "v2"})]

    def test_a_failing_download_is_one_message(self, monkeypatch):
        def download(*words: Any, **options: Any) -> str:
            raise ConnectionError("the hub cannot be reached\nmore lines\nthat do not help")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(UsageError) as caught:
            SpeculatorModelConfig.from_pretrained("owner/draft")
        message = str(caught.value)
        assert "owner/draft" in message and "the hub cannot be reached" in message
        assert "\n" not in message

    def test_a_local_folder_takes_precedence(self, tmp_path, monkeypatch):
        (tmp_path / "owner" / "draft").mkdir(parents=True)
        (tmp_path / "owner" / "draft" / "config.json").write_text(json.dumps(COMPLETE))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *words, **options: pytest.fail("asked the hub"))
        assert SpeculatorModelConfig.from_pretrained("owner/draft").draft_vocab_size == 32
