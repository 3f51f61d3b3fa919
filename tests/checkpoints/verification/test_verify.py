"""``specforge verify`` accepts good exports, and names every known corruption of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_drafts import VERIFIER
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.__main__ import main
from specforge.checkpoints.verification.checking import export_faults
from specforge.hookspecs import CheckpointFormat
from specforge.registry import installed

# A head in its verifier's folder is tested with verifiers that have one.
FORMATS = sorted(installed().all(CheckpointFormat).keys() - {"mtp/native"})
WEIGHTS = "model.safetensors"
IDS = "eagle_aux_hidden_state_layer_ids"
Files = tuple[dict[str, Any], dict[str, Tensor]]
Corruption = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.mark.parametrize("key", FORMATS)
def test_a_good_export_has_no_faults(
    key: str, exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(exported(key))]) == 0
    assert "Done: nothing is wrong (rules, settings, tensors, logits)" in capsys.readouterr().out
    assert export_faults(exported(key), str(VERIFIER)) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cast_export_has_no_faults(dtype: str, exported: Callable[..., Path]) -> None:
    assert export_faults(exported("eagle3/vllm", "--dtype", dtype), str(VERIFIER)) == []


# Corruptions. Each changes config.json and the tensors in place.


def setting(path: str, value: Any) -> Corruption:
    """Set a field of config.json; ``...`` removes it."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = config[parent]
        if value is ...:
            del config[name]
        else:
            config[name] = value(config.get(name)) if callable(value) else value

    return change


def tensor(name: str, value: Callable[[Tensor], Tensor] | None) -> Corruption:
    """Change a tensor; None removes it."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]).contiguous()

    return change


def added(name: str, value: Tensor) -> Corruption:
    return lambda config, tensors: tensors.update({name: value})


def renamed(old: str, new: str) -> Corruption:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [key for key in tensors if key.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def both(*changes: Corruption) -> Corruption:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for change in changes:
            change(config, tensors)

    return change


def absolute(d2t: Tensor) -> Tensor:
    return d2t + torch.arange(d2t.numel())


def cast(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, item in tensors.items():
        tensors[name] = item.bfloat16() if item.is_floating_point() else item


LAYERS = "transformer_layer_config"
Q = "self_attn.q_proj.weight"
CORRUPTIONS: dict[str, tuple[str, Corruption, str]] = {
    # EAGLE-3 for vLLM.
    "layer ids shifted": (
        "eagle3/vllm",
        setting(IDS, lambda ids: [layer + 1 for layer in ids]),
        rf"{IDS} is \[3, 5, 6\]",
    ),
    "layer ids not ascending": ("eagle3/vllm", setting(IDS, [5, 4, 2]), "must be ascending"),
    "layer ids missing": ("eagle3/vllm", setting(IDS, None), f"{IDS} is not set"),
    "d2t absolute": ("eagle3/vllm", tensor("d2t", absolute), "d2t must hold id - index|looks like the ids themselves"),
    "d2t and t2d absolute": (
        "eagle3/vllm",
        both(tensor("d2t", absolute), tensor("t2d", None)),
        "looks like the ids themselves",
    ),
    "d2t missing": ("eagle3/vllm", tensor("d2t", None), "d2t is missing"),
    "d2t of zeros": ("eagle3/vllm", tensor("d2t", torch.zeros_like), "d2t"),
    "d2t of another type": ("eagle3/vllm", tensor("d2t", lambda one: one.int()), "d2t is torch.int32"),
    "t2d inconsistent": ("eagle3/vllm", tensor("t2d", lambda one: one.roll(1)), "t2d marks"),
    "t2d missing": ("eagle3/vllm", tensor("t2d", None), "missing: t2d"),
    "midlayer names": ("eagle3/vllm", renamed("layers.0.", "midlayer."), r"midlayer\.\*"),
    "norm_before_residual flipped": (
        "eagle3/vllm",
        setting("norm_before_residual", True),
        "norm_before_residual is True, but the draft was trained with False",
    ),
    "norm_before_residual missing": (
        "eagle3/vllm",
        setting("norm_before_residual", ...),
        "is not set: vLLM assumes true",
    ),
    "post-norm state fed back": ("eagle3/vllm", setting("norm_output", True), "norm_output is True"),
    "rope theta changed": (
        "eagle3/vllm",
        both(setting(f"{LAYERS}.rope_parameters.rope_theta", 5e5), setting(f"{LAYERS}.rope_theta", 5e5)),
        r"rope_theta is 500000\.0, but the draft was trained with 10000\.0",
    ),
    "legacy rope theta changed": (
        "eagle3/vllm",
        setting(f"{LAYERS}.rope_theta", 5e5),
        "readers use one or the other",
    ),
    "rope missing": (
        "eagle3/vllm",
        both(*(setting(f"{LAYERS}.{key}", ...) for key in ("rope_parameters", "rope_theta", "rope_scaling"))),
        "rotary embeddings are not set",
    ),
    "partial rotation": (
        "eagle3/vllm",
        setting(f"{LAYERS}.rope_parameters.partial_rotary_factor", 0.5),
        "partial_rotary_factor is 0.5, but the trained llama layers rotate",
    ),
    "three-dimensional positions": (
        "eagle3/vllm",
        setting(f"{LAYERS}.rope_parameters.mrope_section", [2, 3, 3]),
        "mrope_section ask for three-dimensional positions",
    ),
    "short positions": (
        "eagle3/vllm",
        setting(f"{LAYERS}.max_position_embeddings", 128),
        "max_position_embeddings is 128",
    ),
    "model_type at the top": ("eagle3/vllm", setting("model_type", "llama"), "top-level model_type"),
    "other type": ("eagle3/vllm", setting("speculators_model_type", "eagle"), "speculators_model_type"),
    "wrong verifier": (
        "eagle3/vllm",
        setting("speculators_config.verifier.name_or_path", "owner/other"),
        "names the verifier owner/other",
    ),
    "tensor missing": ("eagle3/vllm", tensor("norm.weight", None), r"missing: norm\.weight"),
    "extra tensor": ("eagle3/vllm", added("verifier_lm_head.weight", torch.ones(2, 2)), "which is the verifier's"),
    "extra layer": ("eagle3/vllm", added("layers.1.norm.weight", torch.ones(2)), r"unknown: layers\.1"),
    "tensor cut": ("eagle3/vllm", tensor("lm_head.weight", lambda one: one[:-1]), r"lm_head\.weight is \["),
    "tensor transposed": (
        "eagle3/vllm",
        tensor("layers.0.self_attn.o_proj.weight", lambda weight: weight.T),
        "tensors differ",
    ),
    "tensor with other values": ("eagle3/vllm", tensor("fc.weight", lambda one: one * 1.001), r"exported: fc\.weight"),
    "tensor not finite": (
        "eagle3/vllm",
        tensor("fc.weight", lambda weight: weight / 0),
        r"fc\.weight holds values that are not",
    ),
    "dtype wrong": ("eagle3/vllm", setting("dtype", "bfloat16"), "dtype 'bfloat16', but the tensors are float32"),
    "cast with the old dtype": ("eagle3/vllm", cast, "dtype 'float32', but the tensors are bfloat16"),
    "cast with the new dtype": ("eagle3/vllm", both(cast, setting("dtype", "bfloat16")), "tensors differ from those"),
    "hidden size wrong": ("eagle3/vllm", setting(f"{LAYERS}.hidden_size", 96), "states of width 96"),
    "heads wrong": ("eagle3/vllm", setting(f"{LAYERS}.num_attention_heads", 8), "num_attention_heads is 8|is \\["),
    "vocabulary wrong": ("eagle3/vllm", setting(f"{LAYERS}.vocab_size", 1281), "vocab_size is 1281"),
    "tie flag": ("eagle3/vllm", setting(f"{LAYERS}.tie_word_embeddings", True), "tie_word_embeddings is true"),
    "wrong number of aux states": (
        "eagle3/vllm",
        setting(f"{LAYERS}.num_aux_hidden_states", 2),
        "num_aux_hidden_states",
    ),
    "wrong epsilon": ("eagle3/vllm", setting(f"{LAYERS}.rms_norm_eps", 1e-2), "rms_norm_eps is 0.01"),
    "embeddings left out": (
        "eagle3/speculators",
        tensor("embed_tokens.weight", None),
        r"embed_tokens\.weight is missing: speculators",
    ),
    "no such proposal": (
        "eagle3/vllm",
        setting("speculators_config.default_proposal_method", "tree"),
        "default_proposal_method",
    ),
    # EAGLE-3 for SGLang.
    "names of vLLM": ("eagle3/sglang", renamed("midlayer.", "layers.0."), r"no tensor begins with midlayer\."),
    "ids in the sense of vLLM": ("eagle3/sglang", setting("eagle_config", {IDS: [3, 4, 5]}), IDS),
    "ids at the top": ("eagle3/sglang", setting(IDS, [2, 4, 5]), "where SGLang ignores it"),
    "an option of vLLM": ("eagle3/sglang", setting("fc_norm", True), "does not support fc_norm"),
    "unused embeddings": (
        "eagle3/sglang",
        added("embed_tokens.weight", torch.ones(1280, 64)),
        "drafts with the verifier's embeddings",
    ),
    "another architecture": ("eagle3/sglang", setting("architectures", ["LlamaForCausalLM"]), "architectures is"),
    # EAGLE-1.
    "bias for vLLM": ("eagle/vllm", added("fc.bias", torch.ones(64)), "fc.bias, which vLLM silently ignores"),
    "bias dropped for SGLang": ("eagle/sglang", tensor("fc.bias", None), "no fc.bias: SGLang always has one"),
    "bias set but missing": ("eagle/eagle", setting("bias", True), '"bias" is true'),
    "bias not set": ("eagle/eagle", setting("bias", ...), '"bias" is true or not set'),
    "bias dropped for HASS": ("eagle/hass", tensor("fc.bias", None), '"bias" is true'),
    "two layers": ("eagle/vllm", setting("num_hidden_layers", 2), "num_hidden_layers is 2"),
    "another family": (
        "eagle/vllm",
        setting("architectures", ["Qwen3ForCausalLM"]),
        "vLLM has drafts of this kind for",
    ),
    "layernorms flipped": ("eagle/speculators", setting("layernorms", True), "missing: embedding_layernorm"),
    "keys and values swapped": (
        "eagle/vllm",
        both(
            renamed("layers.0.self_attn.k_proj", "keys"),
            renamed("layers.0.self_attn.v_proj", "layers.0.self_attn.k_proj"),
            renamed("keys", "layers.0.self_attn.v_proj"),
        ),
        r"exported: transformer\.self_attn\.k_proj",
    ),
    # MLP speculators.
    "state scaling changed": ("mlp/mlp_speculator", setting("scale_input", False), "normalized is False"),
    "tied weights changed": ("mlp/mlp_speculator", setting("tie_weights", False), "missing: emb"),
    "heads left out": ("mlp/mlp_speculator", setting("n_predict", 2), "one number for each of the 2 heads"),
    "input scaling not set": ("mlp/mlp_speculator", setting("scale_input", ...), "scale_input is not set"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_named(
    name: str, exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, corrupt, named = CORRUPTIONS[name]
    folder = tmp_path / "export"
    shutil.copytree(exported(key), folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    corrupt(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    assert main(["verify", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert re.search(named, shown), shown
    assert shown.count("likely cause:") == shown.count("FAULT:") >= 1


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_file_is_found(share: float, exported: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(exported("eagle3/vllm"), tmp_path / "export")
    path = tmp_path / "export" / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    (fault,) = export_faults(tmp_path / "export")
    assert WEIGHTS in fault.what and "damaged" in fault.what


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_found(name: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(exported("eagle/vllm"), tmp_path / "export")
    (tmp_path / "export" / name).unlink()
    (fault,) = export_faults(tmp_path / "export")
    assert f"holds no {name}" in fault.what


def test_another_verifier_is_found(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A fine-tuned verifier has the same sizes, but different weights."""
    shutil.copytree(VERIFIER, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / WEIGHTS)
    name = next(key for key in tensors if key.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name] * 1.01}, tmp_path / "tuned" / WEIGHTS, metadata={"format": "pt"})
    (fault,) = export_faults(exported("eagle3/vllm"), str(tmp_path / "tuned"))
    assert "is not the verifier that the draft was trained for" in fault.what


def test_a_draft_that_accepts_less_than_before_is_found(exported: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(exported("eagle/vllm"), tmp_path / "export")
    path = tmp_path / "export" / "specforge_probe.json"
    values = json.loads(path.read_text())
    values["served"]["acceptance_length"] = dict.fromkeys(values["served"]["acceptance_length"], 3.0)
    path.write_text(json.dumps(values))
    (fault,) = export_faults(tmp_path / "export", str(VERIFIER))
    assert "3.000 is expected" in fault.what


def test_a_network_with_another_output_is_found(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings and tensors are right; the code is wrong."""
    from specforge_eagle.model import EagleSpeculator

    fuse = EagleSpeculator.fuse
    monkeypatch.setattr(EagleSpeculator, "fuse", lambda self, tokens, feature: fuse(self, tokens, 1.1 * feature))
    (fault,) = export_faults(exported("eagle/vllm"))
    assert "on the probe, at step 0, logits are up to" in fault.what and "output differs" in fault.cause


def test_a_folder_without_a_probe_is_rejected(
    draft_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(draft_of("eagle"))]) == 2
    assert "holds no specforge_probe.json" in capsys.readouterr().err


def test_a_damaged_probe_is_named(
    exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported("eagle/vllm"), tmp_path / "export")
    (tmp_path / "export" / "specforge_probe.json").write_text('{"algorithm": "eagle"}')
    assert main(["verify", str(tmp_path / "export")]) == 2
    assert "specforge_probe.json: format: Field required" in capsys.readouterr().err


def test_a_probe_is_small(exported: Callable[..., Path]) -> None:
    """It does not store logits of the complete vocabulary."""
    assert all((exported(key) / "specforge_probe.json").stat().st_size < 50_000 for key in FORMATS)
