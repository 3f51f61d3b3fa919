"""vLLM's CPU build serves a verifier's folder with a head that was trained here, as the method mtp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mimo_verifier import write_mimo_verifier
from serving import DRAFTED, MAX_TOKENS, Draft, Served, ask_vllm, fit
from transformers import AutoModelForCausalLM

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.decoding.loop import Decoder
from specforge.proposals import GreedyTokenProposalConfig

HEAD = Draft({"mtp_steps": DRAFTED}, "native", {"method": "mtp", "num_speculative_tokens": DRAFTED})


def test_a_trained_head_is_served_with_its_verifier(verifier: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    mimo, export = tmp_path / "mimo", tmp_path / "export"
    write_mimo_verifier(verifier, mimo)
    run = fit("mtp", mimo, tmp_path, HEAD, trust_remote_code=True)
    words = ["--format", HEAD.format, "--dtype", "fp32", "--output", str(export), "--trust_remote_code", "true"]
    assert main(["export", str(run), *words]) == 0
    untouched = [path for path in mimo.glob("*.safetensors") if path.samefile(export / path.name)]
    assert untouched, "files without tensors of the head are linked"

    trusted = {"trust_remote_code": True}
    engines = {"none": trusted, "mtp": {**trusted, "speculative_config": HEAD.speculative}}
    answers = ask_vllm(Served(export, {}, {}, prompts), engines, tmp_path, "engine.py", len(prompts))
    assert answers["mtp"]["tokens"] == answers["none"]["tokens"]

    model = AutoModelForCausalLM.from_pretrained(mimo, dtype=torch.float32, **trusted).eval()
    draft = SpeculatorModel.from_pretrained(run / "draft", verifier=model)
    decoder = Decoder(model, draft, GreedyTokenProposalConfig(speculative_tokens=DRAFTED), stop_tokens=[])
    texts = [torch.tensor(tokens) for tokens in prompts]
    rounds = [one for one in decoder.decode(texts, MAX_TOKENS) if one.drafted is not None]
    counted = answers["mtp"]["counters"]
    print(f"mtp: {counted['drafts']} passes in vLLM, {len(rounds)} here")
    assert counted["drafts"] == pytest.approx(len(rounds), rel=0.01)
    assert sum(len(one.tokens) for one in rounds) > 1.3 * len(rounds), "a useless draft would prove nothing"
