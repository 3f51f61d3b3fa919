"""Initial drafts: layers of the verifier, a stored language model, a fresh network; and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_models import plain_model
from tiny_verifiers import SHAPE, TinyVerifier, random_verifier
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, MistralConfig, PhiConfig, T5Config

from specforge.errors import UsageError
from specforge.verifier.loading import VerifierLoading, load_config
from specforge.verifier.parts import VerifierParts
from specforge_draft_model.model import DraftModel
from specforge_draft_model.module import DraftModelModule
from specforge_draft_model.start import DraftModelSettings, start

TOKENS = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(0))
QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart" / "verifier"


def started(verifier: Path, **settings: Any) -> DraftModel:
    """Make a draft as in a run."""
    module = DraftModelModule(verifier=str(verifier), draft=DraftModelSettings(**settings))
    parts = VerifierParts.from_pretrained(str(verifier))
    module.teacher.hold(None, parts)
    module.create_draft(Any)
    start(module.draft, module.settings, module.teacher.name, module.teacher.loading)
    return module.draft


def logits(draft: DraftModel) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1])[None]
    return draft.logits(draft.advance(TOKENS, positions))


def test_all_layers_of_the_verifier_are_the_verifier(tiny_verifiers: Mapping[str, TinyVerifier]) -> None:
    """For sharded files, tied heads, windows and soft caps, and the text part of a model that reads images."""
    for name, verifier in tiny_verifiers.items():
        model = verifier.model
        expected = model(TOKENS, **({"token_type_ids": torch.zeros_like(TOKENS)} if "images" in name else {})).logits
        draft = started(verifier.folder, init_layers=list(range(8)))
        torch.testing.assert_close(logits(draft), expected, atol=1e-4, rtol=1e-4, msg=name)


def test_a_head_with_a_bias_is_taken_completely(tmp_path: Path) -> None:
    sizes = {**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}
    verifier = random_verifier(PhiConfig(**{name: size for name, size in sizes.items() if name != "head_dim"}), seed=5)
    verifier.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(started(tmp_path, init_layers=[0, 1])), verifier(TOKENS).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["llama-sharded", "gemma3"])
def test_some_layers_are_those_of_the_verifier(name: str, tiny_verifiers: Mapping[str, TinyVerifier]) -> None:
    verifier, layers = tiny_verifiers[name], [0, 3, 7]
    draft = started(verifier.folder, init_layers=layers)
    cut = copy.deepcopy(verifier.model)
    cut.model.layers = torch.nn.ModuleList(cut.model.layers[layer] for layer in layers)
    cut.config.num_hidden_layers = 3
    if name == "gemma3":  # alternating sliding and full attention
        kinds = verifier.model.config.layer_types
        assert draft.config.language_model.layer_types == [kinds[layer] for layer in layers]
        cut.config.layer_types = draft.config.language_model.layer_types
    torch.testing.assert_close(logits(draft), cut(TOKENS, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_a_fresh_network_has_the_verifiers_embeddings_norm_and_head(tiny_verifiers: Mapping[str, TinyVerifier]) -> None:
    for name in ("llama", "llama-tied"):
        verifier = tiny_verifiers[name]
        draft = started(verifier.folder, num_layers=1, intermediate_size=20)
        state, own = draft.language_model.state_dict(), verifier.model.state_dict()
        for part in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert (part in state) == (part != "lm_head.weight" or name == "llama")
            assert part not in state or torch.allclose(state[part], own[part])
        assert state["model.layers.0.mlp.up_proj.weight"].shape == (20, 16)
        assert "model.layers.1.mlp.up_proj.weight" not in state
    narrow = started(tiny_verifiers["llama"].folder, hidden_size=12, layer_type="qwen3")
    assert narrow.head_weights.shape == (61, 12) and logits(narrow).shape == (1, 12, 61)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_head=4, n_layer=2, n_positions=64, vocab_size=50, bos_token_id=None, eos_token_id=None),
        MistralConfig(**{**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 32, "sliding_window": 6}),
        LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}, tie_word_embeddings=True),
    ],
    ids=["gpt2", "mistral", "llama"],
)
def test_a_stored_model_computes_the_same(
    config: Any, tiny_verifiers: Mapping[str, TinyVerifier], tmp_path: Path
) -> None:
    model = random_verifier(config, seed=3)
    model.save_pretrained(tmp_path)
    draft = started(tiny_verifiers["llama"].folder, init_model=str(tmp_path))
    known = TOKENS.clamp(max=config.vocab_size - 1)
    torch.testing.assert_close(logits(draft), model(known).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain_model(draft)(known).logits.float(), model(known).logits, atol=1e-4, rtol=1e-4)
    # Engines do not draft beyond this length.
    assert draft.config.language_model.max_position_embeddings == 64


def test_only_the_language_model_of_a_stored_model_that_reads_images_is_taken(
    tiny_verifiers: Mapping[str, TinyVerifier],
) -> None:
    folder = str(tiny_verifiers["gemma3-images"].folder)
    layers, stored = started(Path(folder), init_layers=list(range(8))), started(Path(folder), init_model=folder)
    assert torch.equal(logits(layers), logits(stored))


def test_quantised_weights_are_refused(tiny_verifiers: Mapping[str, TinyVerifier], tmp_path: Path) -> None:
    shutil.copytree(tiny_verifiers["llama"].folder, tmp_path / "verifier")
    path = tmp_path / "verifier" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    for settings in ({"init_layers": [0]}, {"init_model": str(path.parent)}):
        verifier = path.parent if "init_layers" in settings else tiny_verifiers["llama"].folder
        with pytest.raises(UsageError, match=r"model\.draft\.init_.*: the weights of .* are quantised"):
            DraftModelModule(verifier=str(verifier), draft=DraftModelSettings(**settings))


def saved(folder: Path, config: Any) -> str:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def other_tokenizer(folder: Path) -> str:
    """A copy of the quickstart's verifier whose tokenizer has two ids swapped."""
    shutil.copytree(QUICKSTART, folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"!": 3,', '"!": 4 ,').replace('"\\"": 4,', '"\\"": 3,'))
    return str(folder)


REFUSED: dict[str, Any] = {
    "a larger vocabulary": (
        lambda folder: {
            "init_model": saved(folder, LlamaConfig(**{**SHAPE, "vocab_size": 70, "num_hidden_layers": 1}))
        },
        r"model\.draft\.init_model: .* has 70 tokens, and the verifier .*llama only 61",
    ),
    "fewer learnt positions": (
        lambda folder: {
            "init_model": saved(folder, GPT2Config(n_embd=16, n_head=4, n_layer=1, n_positions=20, vocab_size=50))
        },
        r"model\.draft\.init_model: .* has learnt 20 positions, and the verifier's texts may have 64",
    ),
    "an encoder": (
        lambda folder: {
            "init_model": saved(
                folder,
                BertConfig(
                    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8
                ),
            )
        },
        r"model\.draft\.init_model: .* is no causal language model: its prediction at a token depends on later tokens",
    ),
    "no folder": (lambda folder: {"init_model": "/nowhere"}, r"model\.draft\.init_model: /nowhere is not a folder"),
    "a layer that is missing": (
        lambda folder: {"init_layers": [0, 8]},
        r"model\.draft\.init_layers: \[0, 8\] must be ascending ids of the verifier's layers, 0\.\.7",
    ),
    "layers in another order": (lambda folder: {"init_layers": [3, 1]}, r"\[3, 1\] must be ascending ids"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_impossible_start_is_named(what: str, tiny_verifiers: Mapping[str, TinyVerifier], tmp_path: Path) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(UsageError, match=message) as raised:
        started(tiny_verifiers["llama"].folder, **settings(tmp_path))
    assert "verifier verifier" not in str(raised.value)


def test_a_configuration_of_an_encoder_and_a_decoder_is_refused(
    tiny_verifiers: Mapping[str, TinyVerifier], tmp_path: Path
) -> None:
    T5Config(vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"model\.draft\.init_model: .*'t5' is not a causal language model"):
        started(tiny_verifiers["llama"].folder, init_model=str(tmp_path))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    message = r"init_model: .* has another tokenizer .*: id 3 is '\"' there and '!' here, and 2 ids differ"
    with pytest.raises(UsageError, match=message):
        started(QUICKSTART, init_model=other_tokenizer(tmp_path / "other"))


def test_the_verifiers_own_tokenizer_is_taken() -> None:
    draft = started(QUICKSTART, init_model=str(QUICKSTART))
    assert draft.vocabulary_size == load_config(str(QUICKSTART), VerifierLoading()).vocab_size


def test_two_starts_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="init_model and init_layers exclude each other"):
        DraftModelSettings(init_model="x", init_layers=[1])
