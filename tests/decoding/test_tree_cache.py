from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_verifiers import VOCABULARY
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from specforge.decoding.verifier import CachedVerifier
from specforge.models.tree_cache import TreeCache, ancestors_of
from specforge.verifier.features import Features, capture

AUX = [1, 2]
CPU = torch.device("cpu")


@st.composite
def trees(draw: st.DrawFn, rows: int, max_nodes: int = 7, before: int = 0) -> list[list[int]]:
    """Parents of new nodes after ``before`` existing ones; every node comes after its parent."""
    number = draw(st.integers(1, max_nodes))
    return [[draw(st.integers(-1, before + node - 1)) for node in range(number)] for _ in range(rows)]


def path_of(parents: list[int], node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


@settings(max_examples=60)
@given(data=st.data())
def test_ancestors_are_those_found_by_climbing(data: st.DataObject) -> None:
    parents = data.draw(st.integers(1, 3).flatmap(lambda rows: trees(rows, max_nodes=12)))
    found = ancestors_of(torch.tensor(parents))
    for row, own in enumerate(parents):
        for node in range(len(own)):
            assert found[row, node].nonzero().squeeze(1).tolist() == path_of(own, node)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 65, 300])
def test_a_chain_of_any_length_is_followed_to_its_top(length: int) -> None:
    chain = torch.arange(length).expand(2, -1) - 1
    assert torch.equal(ancestors_of(chain), torch.ones(2, length, length, dtype=torch.bool).tril())


@dataclass
class Mirror:
    """A cached verifier, with plain lists of the tokens that it should have seen."""

    verifier: PreTrainedModel
    committed: list[list[int]]
    tokens: list[list[int]] = field(default_factory=list)
    parents: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.passes = CachedVerifier(self.verifier, AUX, len(self.committed))
        padded = pad_sequence([torch.tensor(row) for row in self.committed], batch_first=True)
        features = self.passes.begin(padded)
        for row, own in enumerate(self.committed):
            self._compare(features, row, slice(0, len(own)), own, slice(0, len(own)))
        self.passes.cache.keep_first(torch.tensor([len(row) for row in self.committed]))
        self._forget()

    def run(self, tokens: list[list[int]], parents: list[list[int]]) -> None:
        features = self.passes.run(torch.tensor(tokens), torch.tensor(parents))
        for row, (own, own_parents) in enumerate(zip(tokens, parents, strict=True)):
            first = len(self.tokens[row])
            self.tokens[row] += own
            self.parents[row] += own_parents
            for index in range(len(own)):
                text = self.committed[row] + self.path(row, first + index)
                self._compare(features, row, slice(index, index + 1), text, slice(-1, None))

    def path(self, row: int, node: int) -> list[int]:
        return [self.tokens[row][index] for index in path_of(self.parents[row], node)]

    def keep(self, nodes: list[int]) -> None:
        """Keep the path to a node of each row, -1 for nothing; values after a path in the batch are arbitrary."""
        paths = [path_of(parents, node) for parents, node in zip(self.parents, nodes, strict=True)]
        longest = max(map(len, paths))
        self.passes.cache.keep(
            torch.tensor([path + [0] * (longest - len(path)) for path in paths]).view(len(paths), longest),
            torch.tensor([len(path) for path in paths]),
        )
        for row, path in enumerate(paths):
            self.committed[row] += [self.tokens[row][node] for node in path]
        self._forget()

    def drop(self) -> None:
        self.passes.cache.drop()
        self._forget()

    def select(self, rows: list[int]) -> None:
        self.passes.cache.select(torch.tensor(rows))
        self.committed = [list(self.committed[row]) for row in rows]
        self._forget()

    def _forget(self) -> None:
        assert self.passes.cache.lengths.tolist() == [len(row) for row in self.committed]
        self.tokens = [[] for _ in self.committed]
        self.parents = [[] for _ in self.committed]

    def _compare(self, features: Features, row: int, part: slice, text: list[int], expected_part: slice) -> None:
        tokens = torch.tensor([text])
        expected = capture(self.verifier, tokens, torch.arange(len(text))[None], AUX)
        # Norms and softmax compute in float32 in some families.
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(features.last[row, part], expected.last[0, expected_part], **close)
        torch.testing.assert_close(features.aux[row, part], expected.aux[0, expected_part], **close)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "mistral", "llama, eager", "gemma3, eager"])
@settings(max_examples=10)
@given(data=st.data())
def test_a_node_sees_only_its_path(
    name: str, data: st.DataObject, verifier_named: Callable[[str], PreTrainedModel]
) -> None:
    token = st.integers(0, VOCABULARY - 1)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="lengths")
    mirror = Mirror(
        verifier_named(name), [data.draw(st.lists(token, min_size=length, max_size=length)) for length in lengths]
    )
    for _ in range(data.draw(st.integers(1, 3), label="rounds")):
        rows = len(mirror.committed)
        for _ in range(data.draw(st.integers(1, 2), label="passes")):
            before = len(mirror.tokens[0])
            parents = data.draw(trees(rows, max_nodes=5, before=before), label="parents")
            tokens = [[data.draw(token) for _ in own] for own in parents]
            mirror.run(tokens, parents)
        if data.draw(st.integers(0, 4)) == 0:
            mirror.drop()
        else:
            last = st.integers(-1, len(mirror.tokens[0]) - 1)
            mirror.keep([data.draw(last) for _ in range(rows)])
        if data.draw(st.booleans()):
            mirror.select(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True)))


def test_gaps_after_short_sequences_stay_unseen(verifier_named: Callable[[str], PreTrainedModel]) -> None:
    """The short row's slots between its own tokens and the longest row's end hold leftovers of every round."""
    mirror = Mirror(verifier_named("gemma3"), [[5, 6, 7, 8, 9, 10], [11]])
    for token in range(4):
        mirror.run([[token, 3, 4], [3, token, 5]], [[-1, 0, 1], [-1, -1, -1]])
        mirror.keep([2, 0])
    assert mirror.passes.cache.lengths.tolist() == [18, 5]
    mirror.select([1])
    mirror.run([[1, 2, 3]], [[-1, 0, 1]])
    mirror.keep([2])
    mirror.run([[1, 2]], [[-1, -1]])


def reference(keys: list[Tensor], values: list[Tensor], query: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of one query [heads, D] over the keys of its path [key-value heads, D] each, itself last."""
    near = keys[-window:] if window else keys
    near_values = values[-window:] if window else values
    repeats = query.shape[0] // keys[0].shape[0]
    output = []
    for head, head_query in enumerate(query):
        logits = torch.stack([key[head // repeats] @ head_query for key in near]) * scale
        output.append(logits.softmax(0) @ torch.stack([value[head // repeats] for value in near_values]))
    return torch.stack(output)


@settings(max_examples=15)
@given(data=st.data(), window=st.none() | st.integers(1, 5), seed=st.integers(0, 999))
@example(data=None, window=3, seed=0).via("a long start within a short window")
def test_attention_is_that_of_a_path(data: st.DataObject | None, window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, width, scale = 4, 2, 3, 0.7

    def states(number: int, length: int) -> Tensor:
        return torch.randn(2, number, length, width, generator=generator, dtype=torch.float64)

    cache = TreeCache(2, CPU)
    counts = [6, 4] if data is None else data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=2))
    committed: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(2):
        # Tokens that follow one another, some of them padding.
        length = max(counts) + 1
        index = cache.extend(length)
        assert index.tolist() == [list(range(len(row), len(row) + length)) for row in committed]
        query, key, value = states(heads, length), states(kv_heads, length), states(kv_heads, length)
        output = cache.attend(0, query, key, value, scale, window)
        for row in range(2):
            new = list(zip(key[row].unbind(1), value[row].unbind(1), strict=True))
            for index in range(counts[row]):
                keys, values = zip(*(committed[row] + new[: index + 1]), strict=True)
                expected = reference(list(keys), list(values), query[row, :, index], scale, window)
                torch.testing.assert_close(output[row, :, index], expected)
            committed[row] += new[: counts[row]]
        cache.keep_first(torch.tensor(counts))
    parents = [[-1, 0, 0, 1, -1]] * 2 if data is None else data.draw(trees(2))
    index = cache.append(torch.tensor(parents))
    nodes = len(parents[0])
    query, key, value = states(heads, nodes), states(kv_heads, nodes), states(kv_heads, nodes)
    output = cache.attend(0, query, key, value, scale, window)
    for row, own in enumerate(parents):
        for node in range(nodes):
            path = path_of(own, node)
            assert index[row, node] == len(committed[row]) + len(path) - 1
            keys, values = zip(
                *committed[row], *((key[row, :, slot], value[row, :, slot]) for slot in path), strict=True
            )
            expected = reference(list(keys), list(values), query[row, :, node], scale, window)
            torch.testing.assert_close(output[row, :, node], expected)


def test_a_long_start_needs_no_mask() -> None:
    cache = TreeCache(2, CPU)
    cache.extend(9)
    assert cache.visible() is None and cache.visible(window=9) is None
    near = cache.visible(window=3)
    assert near is not None and near[0].sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]


def test_a_node_sees_only_its_chunk() -> None:
    cache = TreeCache(1, CPU)
    cache.extend(5)
    assert cache.visible(chunk=5) is None
    first = cache.visible(chunk=2)
    assert first is not None and first[0].sum(-1).tolist() == [1, 2, 1, 2, 1]
    cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    cache.keep_first(torch.tensor([5]))
    cache.append(torch.tensor([[-1, 0, 1]]))
    # Tokens 5, 6 and 7; in chunks of 4, each sees from 4 on.
    for chunk, expected in ((4, [[4, 5], [4, 5, 6], [4, 5, 6, 7]]), (6, [[0, 1, 2, 3, 4, 5], [6], [6, 7]])):
        seen = cache.visible(chunk=chunk)
        assert seen is not None and [row.nonzero().flatten().tolist() for row in seen[0]] == expected
