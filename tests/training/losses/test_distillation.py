from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from specforge.errors import SpecforgeError
from specforge.sampling import Sampling
from specforge.training.losses import chunks
from specforge.training.losses.comparison import Term, compiled_compare
from specforge.training.losses.distillation import DraftSteps, Labels, Teacher, distill
from specforge.training.losses.named import chain_weighting, objective_terms
from specforge.training.losses.objectives import Distributions
from specforge.verifier.parts import VerifierParts

H, V = 5, 13
PRUNED = [1, 2, 5, 8, 12]
NAMES = ["kl", "reverse_kl", "cross_entropy", "total_variation", "jsd", "lk_alpha", "lk_lambda", "text", "argmax"]


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks may hold a single target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LEAST_TARGETS", 1)
        yield


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    head: Tensor | list[Tensor]
    teacher: Teacher
    targets: Tensor
    supervised: Tensor
    weights: Tensor
    """Of each step, [S]."""
    tokens: Tensor


def make_problem(
    seed: int = 0, steps: int = 3, rows: int = 7, pruned: bool = True, dtype: torch.dtype = torch.float64
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    norm, head = nn.RMSNorm(H, eps=1e-6), nn.Linear(H, V, bias=False)
    norm.weight = nn.Parameter(1 + 0.3 * random(H), requires_grad=False)
    head.weight = nn.Parameter(random(V, H), requires_grad=False)
    config: Any = SimpleNamespace(final_logit_softcapping=4.0)
    parts = VerifierParts(config, nn.Embedding(V, H), norm, head)
    draft_ids = torch.tensor(PRUNED) if pruned else None
    ahead = torch.arange(rows) + 1 + torch.arange(steps)[:, None]
    supervised = (torch.rand(steps, rows, generator=generator) < 0.7) & (ahead < rows)
    return Problem(
        hidden=random(steps, rows, H).requires_grad_(),
        head=random(len(PRUNED) if pruned else V, H).requires_grad_(),
        teacher=Teacher(3 * random(rows, H), parts, draft_ids),
        targets=ahead.clamp(max=rows - 1),
        supervised=supervised,
        weights=torch.rand(steps, generator=generator, dtype=torch.float64).to(dtype),
        tokens=torch.randint(V, (rows,), generator=generator),
    )


def by_pair(problem: Problem) -> Tensor:
    return problem.weights[:, None].expand_as(problem.supervised)


def run(
    problem: Problem,
    objective: dict[str, float],
    compiled: bool = False,
    weighting: str | None = None,
) -> DraftSteps:
    return distill(
        problem.hidden,
        problem.head,
        problem.teacher,
        problem.targets,
        problem.supervised,
        objective_terms(objective),
        by_pair(problem),
        labels=Labels(problem.tokens, Sampling()),
        compiled=compiled,
        weighting=None if weighting is None else chain_weighting(weighting),
    )


def plain_value(name: str, q: Tensor, p: Tensor, full: Tensor, mean_acceptance: float, text: int | None) -> Tensor:
    """The losses of one row, from probabilities; ``text`` is the draft index of the text's token, if it has one."""
    accepted = torch.minimum(full, q).sum()
    middle = (p + q) / 2
    fading = float(torch.tensor(-3 * mean_acceptance).double().exp())
    kl = (p * (p / q).log()).sum()
    return {
        "kl": kl,
        "reverse_kl": (q * (q / p).log()).sum(),
        "cross_entropy": -(p * q.log()).sum(),
        "total_variation": 1 - accepted,
        "jsd": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
        "lk_alpha": -accepted.log(),
        "lk_lambda": fading * kl + (1 - fading) * (1 - accepted),
        "argmax": -q[p.argmax()].log(),
        "text": q.sum() * 0 if text is None else -q[text].log(),
    }[name]


def plain_factor(weighting: str | None, step: int, chain: dict[int, tuple[float, bool]]) -> float:
    """The factor of a step of one row, from the text's probability and the agreement at each step that counts."""
    if weighting == "dpace":
        smoothed = {k: 0.5 * probability + 0.5 for k, (probability, _) in chain.items()}
        return sum(math.prod(smoothed[k] for k in chain if k <= last) for last in chain if last >= step)
    if weighting == "vat":
        rejected = [k for k, (_, agrees) in chain.items() if not agrees and k <= step]
        return 0.8 ** (step - min(rejected)) if rejected else 1.0
    return 1.0


def plain(problem: Problem, objective: dict[str, float], weighting: str | None = None) -> dict[str, Any]:
    """Row by row and without chunks: the loss with its graph, sums of terms, acceptance and agreement."""
    teacher = problem.teacher
    ids = range(V) if teacher.draft_ids is None else teacher.draft_ids.tolist()
    steps, rows = problem.supervised.shape
    pairs = [(k, i) for k in range(steps) for i in range(rows) if problem.supervised[k, i]]
    norm: Any = teacher.parts.norm
    verifier = {}
    for row in range(rows):
        state = teacher.last[row]
        normalised = state / (state.square().mean() + norm.eps).sqrt() * norm.weight
        logits = torch.tanh(teacher.parts.lm_head.weight @ normalised / 4.0) * 4.0
        verifier[row] = logits.softmax(-1)
    draft = {pair: (problem.head @ problem.hidden[pair]).softmax(-1) for pair in pairs}
    acceptance, agreement = torch.zeros(steps, rows), torch.zeros(steps, rows)
    for k, i in pairs:
        p = verifier[int(problem.targets[k, i])]
        acceptance[k, i] = torch.minimum(p[list(ids)], draft[k, i]).sum().detach()
        agreement[k, i] = float(ids[int(draft[k, i].argmax())] == int(p.argmax()))
    texts = {pair: _index_of(ids, int(problem.tokens[problem.targets[pair]])) for pair in pairs}
    probabilities = {pair: 0.0 if (at := texts[pair]) is None else float(draft[pair][at]) for pair in pairs}
    chains = [
        {k: (probabilities[k, i], bool(agreement[k, i])) for k in range(steps) if (k, i) in draft} for i in range(rows)
    ]
    means = [float(acceptance[k].sum()) / max(1, int(problem.supervised[k].sum())) for k in range(steps)]
    loss = (problem.hidden.sum() + problem.head.sum()) * 0
    sums = {name: torch.zeros(steps) for name in objective}
    for k, i in pairs:
        full = verifier[int(problem.targets[k, i])][list(ids)]
        for name, weight in objective.items():
            value = plain_value(name, draft[k, i], full / full.sum(), full, means[k], texts[k, i])
            sums[name][k] += value.detach()
            loss = loss + weight * problem.weights[k] * plain_factor(weighting, k, chains[i]) * value
    return {"loss": loss, "terms": sums, "acceptance": acceptance, "agreement": agreement}


def _index_of(ids: Any, token: int) -> int | None:
    return list(ids).index(token) if token in ids else None


def assert_same(problem: Problem, outcome: DraftSteps, expected: dict[str, Any]) -> None:
    torch.testing.assert_close(outcome.loss, expected["loss"])
    ours = torch.autograd.grad(outcome.loss, [problem.hidden, problem.head])
    theirs = torch.autograd.grad(expected["loss"], [problem.hidden, problem.head])
    for gradient, exact_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, exact_gradient)
    assert outcome.terms.keys() == expected["terms"].keys()
    for name, sums in outcome.terms.items():
        torch.testing.assert_close(sums.float(), expected["terms"][name])
    torch.testing.assert_close(outcome.acceptance.float(), expected["acceptance"])
    torch.testing.assert_close(outcome.agreement.float(), expected["agreement"])


@pytest.mark.parametrize("chunk", [1, 60, 2**24])
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_the_plain_ones(
    name: str, pruned: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", chunk)
    problem = make_problem(pruned=pruned)
    assert_same(problem, run(problem, {name: 1.0}), plain(problem, {name: 1.0}))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 4),
    rows=st.integers(1, 9),
    pruned=st.booleans(),
    chunk=st.sampled_from([1, 30, 65, 100, 200, 2**24]),
    block=st.sampled_from([1, 2 * V, 2**19]),
    objective=st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 3), min_size=1, max_size=3),
    weighting=st.sampled_from([None, "dpace", "vat"]),
)
def test_any_mixture_in_any_chunks(
    seed: int,
    steps: int,
    rows: int,
    pruned: bool,
    chunk: int,
    block: int,
    objective: dict[str, float],
    weighting: str | None,
) -> None:
    problem = make_problem(seed, steps, rows, pruned)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", chunk)
        monkeypatch.setattr(chunks, "LOGITS_PER_BLOCK", block)
        outcome = run(problem, objective, weighting=weighting)
    assert outcome.supervised is problem.supervised
    assert not outcome.acceptance[~problem.supervised].any()
    assert not outcome.agreement[~problem.supervised].any()
    assert_same(problem, outcome, plain(problem, objective, weighting))


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Choose the backend of torch.compile for losses; code that cannot be traced is an error."""

    def choose(backend: Any) -> None:
        torch.compiler.reset()
        compiled_compare.cache_clear()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))

    yield choose
    compiled_compare.cache_clear()


@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_losses_are_the_plain_ones(name: str, pruned: bool, compile_by: Callable[[Any], None]) -> None:
    compile_by("aot_eager")
    problem = make_problem(pruned=pruned)
    assert_same(problem, run(problem, {name: 1.0}, compiled=True), plain(problem, {name: 1.0}))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_code_that_torch_generates_for_losses_computes_the_same(compile_by: Callable[[Any], None]) -> None:
    compile_by("inductor")
    objective = {name: 0.5 + number for number, name in enumerate(NAMES)}
    problem = make_problem(steps=4, rows=9)
    assert_same(problem, run(problem, objective, compiled=True), plain(problem, objective))


def test_losses_are_compiled_once_for_batches_of_any_size(compile_by: Callable[[Any], None]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compile_by(counter)
    for rows in (7, 9, 20, 33):
        problem = make_problem(seed=rows, rows=rows)
        assert_same(problem, run(problem, {"kl": 1.0}, compiled=True), plain(problem, {"kl": 1.0}))
    assert counter.frame_count == 1
    with torch.no_grad():
        run(problem, {"kl": 1.0}, compiled=True)
    assert counter.frame_count == 2


def test_losses_get_the_verifiers_most_probable_token() -> None:
    """Some of these are no draft tokens."""
    problem = make_problem()

    def outside(rows: Distributions) -> Tensor:
        assert rows.verifier_top is not None
        return (rows.verifier_top < 0) + 0 * rows.log_q.sum(-1)

    terms = [Term("outside", 1.0, outside)]
    teacher, pairs = problem.teacher, problem.supervised
    found = distill(problem.hidden, problem.head, teacher, problem.targets, pairs, terms, by_pair(problem))
    best = teacher.parts.logits(teacher.last).argmax(-1)
    expected = (~torch.isin(best, torch.tensor(PRUNED)))[problem.targets] * pairs
    assert 0 < expected.sum() < pairs.sum()
    assert torch.equal(found.terms["outside"], expected.sum(1).to(torch.float64))


def test_the_gradient_agrees_with_finite_differences() -> None:
    problem = make_problem(steps=2, rows=5)
    objective = {name: 1.0 for name in NAMES if name != "lk_lambda"}
    assert torch.autograd.gradcheck(
        lambda hidden, head: run(replace(problem, hidden=hidden, head=head), objective).loss,
        (problem.hidden, problem.head),
    )


@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_supervised_costs_nothing(name: str, pruned: bool) -> None:
    problem = make_problem(pruned=pruned)
    problem = replace(problem, supervised=torch.zeros_like(problem.supervised))
    outcome = run(problem, {name: 1.0})
    assert float(outcome.loss) == 0
    outcome.loss.backward()
    for leaf in (problem.hidden, problem.head):
        assert leaf.grad is not None and not leaf.grad.any() and leaf.grad.isfinite().all()
    assert not outcome.terms[name].any() and not outcome.acceptance.any() and not outcome.agreement.any()


@pytest.mark.parametrize("name", NAMES)
def test_no_row_reaches_the_last_step(name: str) -> None:
    problem = make_problem()
    problem.supervised[-1] = False
    problem.supervised[0, 0] = True
    assert_same(problem, run(problem, {name: 1.0}), plain(problem, {name: 1.0}))
    (gradient,) = torch.autograd.grad(run(problem, {name: 1.0}).loss, problem.hidden)
    assert not gradient[-1].any() and gradient[0].any() and gradient.isfinite().all()


def test_only_what_is_trained_gets_a_gradient() -> None:
    problem = make_problem()
    expected = torch.autograd.grad(run(problem, {"kl": 1.0}).loss, [problem.hidden, problem.head])
    frozen_head = replace(problem, head=problem.head.detach())
    torch.testing.assert_close(torch.autograd.grad(run(frozen_head, {"kl": 1.0}).loss, problem.hidden)[0], expected[0])
    frozen_hidden = replace(problem, hidden=problem.hidden.detach())
    torch.testing.assert_close(torch.autograd.grad(run(frozen_hidden, {"kl": 1.0}).loss, problem.head)[0], expected[1])
    with torch.no_grad():
        outcome = run(problem, {"kl": 1.0, "lk_lambda": 1.0})
    assert not outcome.loss.requires_grad and outcome.loss > 0


@pytest.mark.parametrize("chunk", [1, 60, 2**24])
def test_each_step_may_have_its_own_head(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to each step separately with its head."""
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", chunk)
    problem = make_problem(pruned=False)
    generator = torch.Generator().manual_seed(1)
    heads = [torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    objective = {"kl": 1.0, "lk_lambda": 0.5, "text": 0.3}
    joint = run(replace(problem, head=heads), objective)
    ours = torch.autograd.grad(joint.loss, [problem.hidden, *heads])
    by_step = [problem.supervised * (torch.arange(3) == step)[:, None] for step in range(3)]
    each = [
        run(replace(problem, head=head, supervised=supervised), objective)
        for head, supervised in zip(heads, by_step, strict=True)
    ]
    theirs = torch.autograd.grad(torch.stack([outcome.loss for outcome in each]).sum(), [problem.hidden, *heads])
    for gradient, exact_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, exact_gradient)
    torch.testing.assert_close(joint.acceptance, torch.stack([outcome.acceptance for outcome in each]).sum(0))
    torch.testing.assert_close(joint.terms["kl"], torch.stack([outcome.terms["kl"] for outcome in each]).sum(0))


def test_states_that_the_head_does_not_read_are_refused() -> None:
    problem = make_problem()
    # A matrix product with the first columns would ignore the others.
    problem = replace(problem, hidden=torch.cat([problem.hidden, problem.hidden], dim=-1))
    with pytest.raises(SpecforgeError, match="heads read a width of 5, but its states have 10: `states`, then"):
        run(problem, {"kl": 1.0})


@pytest.mark.parametrize("chunk", [1, 10_000])
def test_a_further_head_adds_its_logits_and_gives_the_first_no_gradient(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", chunk)
    problem, rank = make_problem(), 2
    generator = torch.Generator().manual_seed(2)
    latents, further = (
        torch.randn(*shape, rank, generator=generator, dtype=torch.float64)
        for shape in (problem.hidden.shape[:2], problem.head.shape[:1])
    )
    hidden = torch.cat([problem.hidden.detach(), latents], dim=-1).requires_grad_()
    head, joined = problem.head.detach(), torch.cat([problem.head.detach(), further], dim=1).requires_grad_()
    further.requires_grad_()

    def gradients(*heads: Tensor | None) -> list[Tensor]:
        outcome = distill(
            *(hidden, heads[0], problem.teacher, problem.targets, problem.supervised),
            objective_terms({"kl": 1.0, "total_variation": 0.5}),
            by_pair(problem),
            further_head=heads[1],
        )
        trained = [tensor for tensor in (hidden, *heads) if tensor is not None and tensor.requires_grad]
        return [outcome.loss.detach(), outcome.acceptance, *torch.autograd.grad(outcome.loss, trained)]

    loss, accepted, of_hidden, of_further = gradients(head, further)
    reference = gradients(joined, None)
    for found, expected in zip((loss, accepted, of_hidden), reference, strict=False):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_further, reference[3][:, -rank:])


def test_candidates_are_the_most_probable_tokens_of_each_pair() -> None:
    problem = make_problem(pruned=False)
    outcome = distill(
        *(problem.hidden, problem.head, problem.teacher, problem.targets, problem.supervised),
        objective_terms({"kl": 1.0}),
        by_pair(problem),
        candidates=3,
    )
    counted = problem.supervised.flatten()
    logits = problem.hidden.flatten(0, 1) @ problem.head.T
    assert outcome.candidates is not None and outcome.verifier_tops is not None
    assert torch.equal(outcome.candidates[counted], logits.topk(3).indices[counted])
    tops = problem.teacher.parts.logits(problem.teacher.last[problem.targets]).argmax(-1).flatten()
    assert torch.equal(outcome.verifier_tops[counted], tops[counted])


def test_backward_scales_the_gradient() -> None:
    problem = make_problem()
    expected = torch.autograd.grad(run(problem, {"kl": 1.0}).loss, [problem.hidden, problem.head])
    scaled = torch.autograd.grad(run(problem, {"kl": 1.0}).loss * -7, [problem.hidden, problem.head])
    for gradient, exact_gradient in zip(scaled, expected, strict=True):
        torch.testing.assert_close(gradient, -7 * exact_gradient)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "stored"])
def test_bfloat16_stays_close(autocast: bool) -> None:
    exact = make_problem(dtype=torch.float32)
    expected = run(exact, {"kl": 1.0, "total_variation": 1.0})
    exact_gradient = torch.autograd.grad(expected.loss, [exact.hidden, exact.head])
    problem = exact
    if not autocast:
        problem = replace(
            exact,
            hidden=exact.hidden.detach().bfloat16().requires_grad_(),
            head=exact.head.detach().bfloat16().requires_grad_(),
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outcome = run(problem, {"kl": 1.0, "total_variation": 1.0})
    assert outcome.loss.dtype == torch.float32
    torch.testing.assert_close(outcome.loss, expected.loss, rtol=0.03, atol=0)
    gradients = torch.autograd.grad(outcome.loss, [problem.hidden, problem.head])
    for gradient, leaf, correct in zip(gradients, (problem.hidden, problem.head), exact_gradient, strict=True):
        assert gradient.dtype == leaf.dtype
        assert (gradient.float() - correct).norm() < 0.05 * correct.norm()


class Rows(TorchDispatchMode):
    """Record the largest number of rows of any tensor whose last dimension is a vocabulary."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.most, self.seen = sizes, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] in self.sizes:
                self.seen += 1
                self.most = max(self.most, tensor.numel() // tensor.shape[-1])
        return output


@pytest.mark.parametrize("objective", [{"kl": 1.0}, {"lk_lambda": 1.0, "jsd": 1.0}], ids=str)
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "full"])
def test_logits_exist_for_one_chunk_at_most(
    pruned: bool, objective: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, targets = 3, 8
    problem = make_problem(steps=steps, rows=500, pruned=pruned)
    draft_size = problem.head.shape[0]
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", targets * (V + steps * draft_size))
    # The head and its gradient, [D, H], do not count: H is neither vocabulary's size in the full case.
    problem = widen(problem, 17)
    with Rows({V, draft_size}) as largest:
        run(problem, objective).loss.backward()
    assert largest.seen > 100
    assert largest.most <= targets * steps


def widen(problem: Problem, width: int) -> Problem:
    """The same problem with wider states, so no width equals the size of a vocabulary."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = problem.teacher.parts
    head = nn.Linear(width, V, bias=False, dtype=torch.float64).requires_grad_(False)
    norm = nn.RMSNorm(width, dtype=torch.float64).requires_grad_(False)
    wide = replace(parts, norm=norm, lm_head=head)
    return replace(
        problem,
        hidden=random(*problem.hidden.shape[:2], width).requires_grad_(),
        head=random(problem.head.shape[0], width).requires_grad_(),
        teacher=replace(problem.teacher, last=random(problem.hidden.shape[1], width), parts=wide),
    )


def test_the_verifiers_distribution_is_computed_once_per_target(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    problem = make_problem(steps=3, rows=40)
    problem.teacher.parts.lm_head.register_forward_hook(lambda _, __, output: rows.append(output.shape[0]))
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 100)
    run(problem, {"kl": 1.0})
    assert len(rows) > 5
    assert sum(rows) == problem.targets[problem.supervised].unique().numel()


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.5, top_k=4)])
def test_labels_give_the_probability_that_the_text_is_drafted_and_accepted(
    pruned: bool, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(seed=4, pruned=pruned)
    teacher = problem.teacher
    ids = list(range(V)) if teacher.draft_ids is None else teacher.draft_ids.tolist()
    text = torch.randint(V, (problem.supervised.shape[1],), generator=torch.Generator().manual_seed(1))
    labels = Labels(text, sampling)
    terms = objective_terms({"kl": 1.0})
    for chunk, block in ((2**24, 2**19), (2**24, 1), (40, 2**19)):
        monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", chunk)
        monkeypatch.setattr(chunks, "LOGITS_PER_BLOCK", block)
        found = distill(
            problem.hidden,
            problem.head,
            teacher,
            problem.targets,
            problem.supervised,
            terms,
            by_pair(problem),
            labels=labels,
        )
        for k, i in problem.supervised.nonzero().tolist():
            token = int(text[problem.targets[k, i]])
            q = problem.head.detach() @ problem.hidden.detach()[k, i]
            matches = float(ids[int(q.argmax())] == token)
            assert float(found.matches[k, i]) == matches
            if sampling.is_greedy:
                assert float(found.drawn[k, i]) == matches
                continue
            p = teacher.parts.logits(teacher.last[problem.targets[k, i]])
            of_draft = float(sampling.log_probs(q[None])[0].exp()[ids.index(token)]) if token in ids else 0.0
            of_verifier = float(sampling.log_probs(p[None])[0].exp()[token])
            # The verifier cannot have produced this token: any probability is accepted.
            expected = min(1.0, of_draft / of_verifier) if of_verifier else float(found.drawn[k, i])
            assert float(found.drawn[k, i]) == pytest.approx(expected, abs=1e-9)
            assert 0 <= float(found.drawn[k, i]) <= 1
        assert not found.matches[~problem.supervised].any() and not found.drawn[~problem.supervised].any()
