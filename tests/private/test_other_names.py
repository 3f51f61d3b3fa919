"""The private names of transformers, datasets, argparse and jsonargparse work as assumed."""

from __future__ import annotations

import argparse

import jsonargparse
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, T5Config
from transformers.models.mamba.modeling_mamba import MambaForCausalLM

from specforge.private import argparse as private_argparse
from specforge.private import transformers as private
from specforge.private.datasets import fingerprint_of

TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_layers_run_the_attention_of_their_configuration(name):
    config = LlamaConfig(**TINY)
    assert private.attention_of(config) is None
    private.set_attention(config, name)
    model = LlamaForCausalLM(config)
    assert private.attention_of(model.config) == private.attention_of(model.model.layers[0].self_attn.config) == name
    assert model.is_backend_compatible()


def test_a_model_with_a_recurrent_state_is_recognised():
    assert not private.is_recurrent(LlamaForCausalLM(LlamaConfig(**TINY)))
    assert private.is_recurrent(MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=8)))


@pytest.mark.parametrize(("config", "is_built"), [(LlamaConfig, True), (BertConfig, True), (T5Config, False)])
def test_an_auto_class_knows_its_configurations(config, is_built):
    assert private.builds(AutoModelForCausalLM, config()) == is_built


def test_a_compiled_template_is_shared_and_takes_a_date():
    source = "{{ strftime_now('%Y') }} of the day"
    private.compiled_template(source).globals["strftime_now"] = lambda form: f"now {form}"
    assert private.compiled_template(source).render() == "now %Y of the day"


def test_a_data_set_has_a_digest_of_its_content():
    rows = Dataset.from_dict({"text": ["a", "b"]})
    assert fingerprint_of(rows) == fingerprint_of(Dataset.from_dict({"text": ["a", "b"]}))
    assert fingerprint_of(rows) != fingerprint_of(rows.map(lambda row: {"text": row["text"] + "c"}))


def test_what_a_parser_of_argparse_holds():
    parser = argparse.ArgumentParser()
    flag = parser.add_argument("--flag")
    commands = parser.add_subparsers()
    inner, hidden = commands.add_parser("inner", help="A summary."), commands.add_parser("hidden")
    _, *found, last = private_argparse.actions(parser)
    assert found == [flag] and private_argparse.subcommands(flag) is None
    assert private_argparse.subcommands(last) == {"inner": (inner, "A summary."), "hidden": (hidden, None)}
    assert private_argparse.action_of(parser, "--flag") is flag
    assert private_argparse.action_of(parser, "--other") is None


def test_what_a_parser_of_jsonargparse_holds():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--number", type=int | None)
    parser.add_argument("--text")
    found = {action.dest: private_argparse.type_of(action) for action in private_argparse.actions(parser)}
    assert found["number"] == int | None and found["text"] is None


def test_what_a_restricted_number_of_jsonargparse_holds():
    assert private_argparse.restriction_of(jsonargparse.typing.PositiveInt) == (int, "v>0")
    assert private_argparse.restriction_of(int) is None
