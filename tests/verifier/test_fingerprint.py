"""The fingerprint of a verifier: the same weights anywhere, other weights nowhere."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.errors import UsageError
from specforge.verifier.fingerprint import fingerprint


@pytest.fixture
def copy(tiny_verifiers, tmp_path):
    shutil.copytree(tiny_verifiers["llama"].folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_is_the_same_wherever_the_weights_lie(tiny_verifiers, copy):
    original = fingerprint(str(tiny_verifiers["llama"].folder))
    assert len(original) == 16 and fingerprint(str(copy)) == original
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint(str(copy)) == original


def test_does_not_depend_on_how_the_weights_are_split(copy):
    whole = fingerprint(str(copy))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(copy.parent / "sharded", max_shard_size="6KB")
    assert len(list((copy.parent / "sharded").glob("*.safetensors"))) > 2
    assert fingerprint(str(copy.parent / "sharded")) == whole


def test_no_two_verifiers_share_one(tiny_verifiers):
    found = {fingerprint(str(one.folder)) for one in tiny_verifiers.values()}
    # Two of them were drawn with other seeds, all with other shapes or seeds.
    assert len(found) == len(tiny_verifiers)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
def test_a_little_training_changes_it(copy, name):
    before = fingerprint(str(copy))
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name] + 1e-3
    save_file(weights, copy / "model.safetensors")
    assert fingerprint(str(copy)) != before


def test_another_type_changes_it(copy):
    before = fingerprint(str(copy))
    weights = {name: one.to(torch.bfloat16) for name, one in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors")
    assert fingerprint(str(copy)) != before


def test_a_damaged_file_is_named(copy):
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"model.safetensors is damaged"):
        fingerprint(str(copy))
