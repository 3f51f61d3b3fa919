"""Figures that several pages quote are the same everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES, CHOOSE, COMPARISON = "docs/recipes.md", "docs/choose.md", "docs/comparison.md"
COST = r"`llama-3.1-8b-{}.yaml` \| {} M \|[^|]+\| {} G \| {} kB"
ANY = r"[\d.,]+"
THIS = r"([\d.,]+)"


def cost(recipe: str, trained: str = ANY, operations: str = ANY, disk: str = ANY) -> tuple[str, str]:
    """Where the table of costs has a recipe's figures; one of them is to be found."""
    return RECIPES, COST.format(recipe, trained, operations, disk)


# By what they mean: the quotations, each a page and the text around the figure.
FIGURES: dict[str, list[tuple[str, str]]] = {
    "the quickstart's acceptance length": [
        ("docs/index.md", rf"step   1300  val/acceptance_length {THIS}"),
        ("docs/training.md", rf"the quickstart reaches {THIS} with its linear schedule"),
        ("docs/training.md", rf"\| 1300 \| [\d.]+ \| {THIS} \|"),
        ("docs/algorithms/measured.md", rf"the shipped rows reach {THIS},"),
    ],
    "the quickstart's time": [
        ("README.md", r"under (\w+) minutes on two cores"),
        ("docs/index.md", r"Training takes under (\w+) minutes"),
        ("configs/quickstart.yaml", r"under (\w+) minutes on two CPU cores"),
        ("specforge/__main__.py", r"a small draft, in (\w+) minutes"),
    ],
    "the quickstart's rows": [
        ("configs/quickstart/README.md", rf"\| Rows \| {THIS} \|"),
        (COMPARISON, rf"the quickstart's {THIS} rows"),
    ],
    "operations of EAGLE-3": [
        cost("eagle3", operations=THIS),
        (CHOOSE, rf"\| EAGLE-3 \| {ANY} M \| {THIS} G"),
        ("docs/algorithms/eagle3.md", rf"this is {THIS} G operations per token"),
    ],
    "operations of EAGLE-1": [
        cost("eagle", operations=THIS),
        (CHOOSE, rf"\| EAGLE-1 \| {ANY} M \| {THIS} G"),
        ("docs/algorithms/eagle3.md", rf"EAGLE-1 takes {THIS} \("),
    ],
    **{
        f"{what} of {name}": [cost(recipe, **{what: THIS}), (CHOOSE, rf"\| {name} \| " + row)]
        for name, recipe in {
            "EAGLE-1": "eagle",
            "EAGLE-3": "eagle3",
            "HASS": "hass",
            "MLP speculator": "mlp",
            "DSpark": "dspark",
        }.items()
        for what, row in {
            "trained": rf"{THIS} M \|",
            "operations": rf"{ANY} M \| {THIS} G \|",
            "disk": rf"{ANY} M \| {ANY} G \| {THIS} kB \|",
        }.items()
    },
    "weights of an MLP speculator": [cost("mlp", THIS), ("docs/algorithms/mlp.md", rf"make the draft large: {THIS} M")],
    "weights of EAGLE-3": [cost("eagle3", THIS), ("docs/algorithms/mlp.md", rf"where EAGLE-3 has {THIS} M")],
    "published: EAGLE-3 in trees": [
        (COMPARISON, rf"\| EAGLE-3, Llama-3.1-8B, trees, [^|]*\| {THIS} \|"),
        ("docs/algorithms/eagle.md", rf"{THIS} tokens per pass against"),
    ],
    "published: EAGLE-2 in trees": [
        (COMPARISON, rf"\| EAGLE-2, the same \| {THIS} \|"),
        ("docs/algorithms/eagle.md", rf"against {THIS} for EAGLE-2"),
    ],
    "published: HASS": [
        (COMPARISON, rf"\| HASS, [^|]*\| {THIS} \("),
        ("docs/algorithms/hass.md", rf"LLaMA3-8B at T = 0, {THIS} tokens per pass"),
    ],
    "published: EAGLE-3 in chains": [
        (COMPARISON, rf"{THIS} \(660,000 prompts"),
        ("docs/first-draft.md", rf"660,000 prompts answered again, {THIS} in chains"),
        ("docs/algorithms/mlp.md", rf"where EAGLE-3 reached {THIS} with"),
    ],
    "published: an MLP speculator in chains": [
        (COMPARISON, rf"\| MLP speculator, [^|]*\| {THIS} \|"),
        ("docs/algorithms/mlp.md", rf"{THIS} tokens per pass on MT-Bench"),
    ],
    "conversations of EAGLE-3's paper": [
        (CHOOSE, rf"EAGLE-3's paper used about {THIS}\."),
        ("docs/algorithms/eagle3.md", rf"trained on about {THIS} conversations"),
    ],
}


@pytest.mark.parametrize("quotations", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_the_same_everywhere(quotations: list[tuple[str, str]]) -> None:
    found = {}
    for page, pattern in quotations:
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        match = re.search(re.sub(r" +", " ", pattern), text)
        assert match, f"{page} has no {pattern}"
        found[page, pattern] = match[1]
    assert len(set(found.values())) == 1, found


def test_the_printed_prompt_is_one_that_the_verifier_answers_well() -> None:
    rows = (ROOT / "configs" / "quickstart" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in map(json.loads, rows)}
    for page in ("README.md", "docs/index.md", "specforge/commands/generate.py", "examples/use_a_draft.py"):
        # A shell joins the lines of a prompt that is broken to fit 80 columns.
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\\\n", "")
        asked = re.findall(r'(?:--prompt |QUESTION = )"([^"]+)"', text)
        assert asked and all(answers[prompt].endswith("60 / 20 = 3 hours.") for prompt in asked), page
