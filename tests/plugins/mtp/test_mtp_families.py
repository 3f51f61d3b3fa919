"""Heads of every family: read from the verifier's files, run over a text, and drafted with."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mtp_verifiers
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from specforge.documents import DocumentLayout
from specforge.models.draft_rows import DraftRows
from specforge.verifier.features import Features, capture
from specforge.verifier.loading import VerifierLoading, load_config, load_verifier
from specforge_mtp.model import MtpDraftModel
from specforge_mtp.native import NativeNames, check_stored, read_head

LOADING = VerifierLoading("float32", trust_remote_code=True)
LENGTH = 20
SEVERAL = ["qwen3_two_heads", "deepseek_v3"]


class Heads:
    """A verifier, its heads, and a text."""

    def __init__(self, folder: Path) -> None:
        name = str(folder)
        self.verifier = load_verifier(name, LOADING)
        self.draft: Any = MtpDraftModel.from_training_args(load_config(name, LOADING), verifier_name_or_path=name)
        check_stored(self.draft.config, name, LOADING)
        self.draft.load_state_dict(read_head(self.draft.config, name, LOADING))
        self.draft.attach_verifier(self.verifier)
        self.draft.eval()
        self.steps = min(3, self.draft.drafter(1).max_depth or 3)
        self.tokens = torch.arange(LENGTH) * 29 % 90 + 3
        self.positions = torch.arange(LENGTH)[None]
        self.features = capture(self.verifier, self.tokens[None], self.positions, [])

    @torch.no_grad()
    def states(self) -> Tensor:
        """States of every step at every row, [S, T, H]."""
        documents = torch.zeros_like(self.positions)
        return self.draft.unroll(self.tokens[None], self.features, self.positions, documents, self.steps)[:, 0]

    def some(self, begin: int, end: int) -> Features:
        """The verifier's states at some tokens."""
        return Features(self.features.aux[:, begin:end], self.features.last[:, begin:end])


@pytest.fixture
def heads_of(verifier_of: Callable[[str], Path]) -> Callable[[str], Heads]:
    return lambda name: Heads(verifier_of(name))


@pytest.mark.parametrize("name", mtp_verifiers.FAMILIES)
@torch.no_grad()
def test_drafting_computes_what_training_does(name: str, heads_of: Callable[[str], Heads]) -> None:
    """From the first token on, also where fewer tokens than heads are there."""
    heads = heads_of(name)
    expected = heads.draft.logits(heads.states())
    drafter, begin = heads.draft.drafter(1), 0
    for end in (1, 2, 6, 7, 11):
        tokens = heads.tokens[None, begin + 1 : end + 1]
        drafter.commit(tokens, heads.some(begin, end), torch.tensor([end - begin]))
        begin, found = end, [drafter.root[0]]
        for step in range(1, heads.steps):
            token = heads.tokens[None, end + step : end + step + 1]
            found.append(drafter.step(token, torch.tensor([[step - 2]]))[0, 0])
        torch.testing.assert_close(torch.stack(found), expected[:, end - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SEVERAL)
@torch.no_grad()
def test_sequences_of_several_lengths_and_siblings_do_not_see_each_other(
    name: str, heads_of: Callable[[str], Heads]
) -> None:
    heads = heads_of(name)
    expected = heads.draft.logits(heads.states())
    drafter, ends = heads.draft.drafter(2), torch.tensor([2, 9])
    whole = Features(heads.features.aux[:, :9].expand(2, -1, -1, -1), heads.features.last[:, :9].expand(2, -1, -1))
    drafter.commit(heads.tokens[None, 1:10].expand(2, -1), whole, ends)
    # Of each sequence, the text's next token between two others.
    true = heads.tokens[ends + 1]
    children = torch.stack([true + 1, true, true + 2], dim=1)
    logits = drafter.step(children, torch.full((2, 3), -1))
    torch.testing.assert_close(drafter.root, expected[0, ends - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 1], expected[1, ends - 1], atol=1e-5, rtol=1e-5)
    assert float((logits[:, 0] - logits[:, 1]).abs().max()) > 1e-3
    drafter.select(torch.tensor([1]))
    drafter.commit(heads.tokens[None, 10:11], heads.some(9, 10), torch.tensor([1]))
    torch.testing.assert_close(drafter.root[0], expected[0, 9], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", mtp_verifiers.FAMILIES)
def test_rows_that_are_not_needed_are_attended_to_and_all_weights_learn(
    name: str, heads_of: Callable[[str], Heads]
) -> None:
    heads = heads_of(name)
    supervised = torch.zeros(heads.steps, LENGTH, dtype=torch.bool)
    supervised[:, [4, 7, 8, 12]] = True
    rows = DraftRows.needed(supervised, DocumentLayout.of(torch.zeros(1, LENGTH, dtype=torch.int64)))
    batch = {"input_ids": heads.tokens[None], "position_ids": heads.positions}
    states = heads.draft.states(batch, heads.features, rows)
    state_index, whole = rows.state_index(), heads.states()
    for step, row in itertools.product(range(heads.steps), (4, 7, 8, 12)):
        torch.testing.assert_close(states[state_index[step, row]], whole[step, row], atol=1e-5, rtol=1e-5)
    states.square().sum().backward()
    assert not [name for name, one in heads.draft.named_parameters() if one.grad is None]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_transformers_computes_the_same(name: str, heads_of: Callable[[str], Heads]) -> None:
    """But for the embedding at position 0, which engines replace and transformers does not."""
    heads = heads_of(name)
    heads.draft.family = replace(heads.draft.family, skips_first=False)
    theirs = MtpModel(heads.verifier, heads.draft.num_heads).eval()
    around = {
        "input_proj": "eh_proj",
        "token_layernorm": "enorm",
        "hidden_layernorm": "hnorm",
        "final_layernorm": "post_norm",
    }
    state = {}
    for own, tensor in heads.draft.state_dict().items():
        _, index, module, *rest = own.split(".")
        inside = [around[module]] if module in around else ["mtp_block", module]
        state[".".join(["layers", index, *inside, *rest])] = tensor
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    cache = MtpCache(config=heads.verifier.config.get_mtp_config())
    read = heads.verifier.model.norm(heads.features.last)
    for step, states in enumerate(heads.states()[: heads.draft.num_heads]):
        count = LENGTH - 1 - step
        tokens, positions = (one[None, 1 + step :] for one in (heads.tokens, heads.positions[0]))
        read = theirs.forward_layer(step, read[:, :count], positions, cache, input_ids=tokens)
        torch.testing.assert_close(states[:count], read[0], atol=1e-5, rtol=1e-5)


def test_experts_are_one_tensor_here_and_many_in_the_files(heads_of: Callable[[str], Heads]) -> None:
    draft = heads_of("qwen3_5_moe").draft
    singly = NativeNames(draft.config, ())
    state, shapes = draft.state_dict(), {name: one.shape for name, one in draft.state_dict().items()}
    split = singly.split(state)
    gate, up = (split[f"mtp.layers.0.mlp.experts.2.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), state["mtp_layers.0.mlp.experts.gate_up_proj"][2])
    again = singly.joined(shapes, split, "files")
    assert all(torch.equal(again[name], one) for name, one in state.items())
    whole = NativeNames(draft.config, {singly.native(name) for name in state})
    assert whole.split(state).keys() == {singly.native(name) for name in state}


def test_the_embedding_at_position_0_is_left_out_where_engines_do(heads_of: Callable[[str], Heads]) -> None:
    for name, skips in (("qwen3_5", False), ("mimo", True), ("glm4_moe", True)):
        heads = heads_of(name)
        first = heads.states()[0, 0]
        heads.tokens[1] = 95
        assert torch.equal(heads.states()[0, 0], first) is skips, name


@pytest.mark.parametrize("name", ["mimo", "deepseek_v3"])
@torch.no_grad()
def test_sampled_text_has_the_verifiers_distribution(name: str, heads_of: Callable[[str], Heads]) -> None:
    """Three tokens, each among the two most probable: the frequencies of the eight texts."""
    heads, number = heads_of(name), 2000
    prompt, expected = heads.tokens[None, :5], {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, probability in expected.items():
            tokens = torch.cat([prompt, torch.tensor([text], dtype=torch.int64)], dim=1)
            top = heads.verifier(tokens).logits[0, -1].topk(2)
            shares = top.values.softmax(-1).tolist()
            longer |= {(*text, int(one)): probability * share for one, share in zip(top.indices, shares, strict=True)}
        expected = longer
    sampled = heads.draft.generate(
        prompt.expand(number, -1),
        max_new_tokens=3,
        do_sample=True,
        top_k=2,
        proposal="sampling:speculative_tokens=2",
        seed=3,
        eos_token_id=[],
    )
    found = Counter(map(tuple, sampled[:, 5:].tolist()))
    assert found.keys() <= expected.keys()
    for text, probability in expected.items():
        deviation = (probability * (1 - probability) / number) ** 0.5
        assert abs(found[text] / number - probability) < 4 * deviation, (text, found[text] / number, probability)


@pytest.mark.parametrize("proposal", ["greedy:speculative_tokens=2", "dynamic_tree:depth=2"])
@torch.no_grad()
def test_several_heads_decode_the_verifiers_own_text(proposal: str, heads_of: Callable[[str], Heads]) -> None:
    """Prompts shorter than the number of heads among them."""
    heads = heads_of("deepseek_v3")
    prompts = torch.stack([heads.tokens[:1], heads.tokens[7:8]])
    expected = heads.verifier.generate(prompts, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    found = heads.draft.generate(prompts, max_new_tokens=12, proposal=proposal, eos_token_id=[], pad_token_id=0)
    assert torch.equal(found, expected)
