r"""A recipe's draft against those of two published trainers, on the same rows and states of the verifier.

    benchmarks/peers/install .venv-peers
    python benchmarks/outcome/run.py --environments .venv-peers
    python benchmarks/outcome/run.py --environments .venv-peers --config configs/smollm2-eagle3.yaml \
        --output runs/outcome-smollm2 -- --data.train train.jsonl --data.validation validation.jsonl

Ours is the draft of ``specforge fit --config CONFIG``; arguments after ``--`` are passed on to it. The packed rows of
that run, in its order, and the verifier's states over them are then written, in float32, and each peer is trained on
them in its own environment: the same optimizer steps, draft vocabulary, test-time steps and aux layers, and one layer.
All other settings are the peer's defaults: network, loss, optimizer and schedule (``train_speculators.py`` and
``train_sglang.py`` list them, and the replacements for a CPU). speculators packs documents as we do. SGLang's
package does not: it takes the documents of a packed row as a padded batch.

Every learning rate is tried with the first seed, and the best, by the acceptance length on the first set of rows, also
with the other seeds. The seed sets only the weights: all read the rows in the same order. The peers' drafts are
converted, and all are measured in the same way: every draft by exact replay of greedy chains on all rows of the sets,
which must be the verifier's own text at temperature 0; the best draft of the first seed also by decoding the prompts,
with chains and trees. The length of chains and the depth of trees is the number of test-time steps.

CPU is the time of the complete training process: ours with the verifier's passes and validation, a peer's without them.
Drafts that exist in ``--output`` are not trained again; ``outcome.json`` there holds the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# Shared with the comparison of a training step.
sys.path.append(str(Path(__file__).parents[1] / "peers"))

from capturing import Run
from environments import DEFAULT, missing
from measuring import SHAPES, decoded, replayed
from tables import Figures, decoded_table, trained_table
from training import NAMES, OURS, PEERS, Trained, Workshop

from specforge.data.text.prompts import prompt_set_name

RATES = {"speculators": (1e-2, 2e-2, 4e-2), "sglang": (5e-3, 2e-2)}


def main() -> None:
    """Train missing drafts, measure all, and print the tables."""
    arguments = parse()
    first, *more = arguments.seeds
    words = ["--config", arguments.config, *arguments.fit]
    workshop = Workshop(words, first, arguments.environments, arguments.output)
    contestants = [(OURS, None), *((key, rate) for key in PEERS for rate in getattr(arguments, key))]
    tried = [workshop.train(key, rate, first) for key, rate in contestants]
    run = workshop.run
    sets = arguments.sets or [run.settings["data"]["validation"]]
    figures = replay(tried, run, sets)
    best = best_of_each(figures, prompt_set_name(sets[0]))
    again = replay([workshop.train(trained.key, trained.rate, seed) for trained in best for seed in more], run, sets)
    figures = sorted(figures + again, key=lambda figure: (list(NAMES).index(figure.trained.key), figure.trained.rate))
    print("\n".join(trained_table(figures, run.chain)), flush=True)
    chosen = [figure for figure in figures if figure.trained in best]
    shapes = [SHAPES[shape].format(chain=run.chain) for shape in arguments.shapes]
    decoding = [
        decoded(
            [two.draft for two in best],
            run.verifier_name,
            sets,
            shapes,
            temperature,
            arguments.limit,
            arguments.output / f"decoding-{temperature:g}",
        )
        for temperature in arguments.temperatures
    ]
    print("\n" + "\n".join(decoded_table(chosen, decoding)))
    everything = [asdict(figure) for figure in figures]
    (arguments.output / "outcome.json").write_text(json.dumps(everything, indent=1, default=str))


def parse() -> argparse.Namespace:
    """Read the command line; check that the output is of the same recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--environments", type=Path, default=DEFAULT, help="Folder given to peers/install.")
    add("--config", default="configs/quickstart.yaml", help="Recipe of EAGLE-3.")
    add("--seeds", type=int, nargs="+", default=[42, 1, 2])
    for key, name in PEERS.items():
        about = f"Learning rates of {name}; none leaves it out."
        add(f"--{key}", type=float, nargs="*", metavar="RATE", default=RATES[key], help=about)
    add("--sets", nargs="+", metavar="FILE", help="Rows to measure on; the recipe's validation rows by default.")
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="What is decoded with.")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="What is decoded at.")
    add("--limit", type=int, help="Prompts of each set to decode; all by default.")
    add("--output", type=Path, default=Path("runs/outcome"))
    add("fit", nargs="*", metavar="-- FIT", help="More words for specforge fit.")
    arguments = parser.parse_args()
    if any(getattr(arguments, key) for key in PEERS) and (reason := missing(arguments.environments)) is not None:
        parser.error(reason)
    recipe = {"recipe": Path(arguments.config).read_text(), "fit": arguments.fit}
    stored = arguments.output / "recipe.json"
    if stored.exists() and json.loads(stored.read_text()) != recipe:
        parser.error(f"{arguments.output} holds drafts of another recipe; give another --output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(recipe))
    return arguments


def replay(drafts: Sequence[Trained], run: Run, sets: Sequence[str]) -> list[Figures]:
    """Replay drafts on sets of rows."""
    if not drafts:
        return []
    verifier, data, folders = run.verifier(), run.data(), [draft.draft for draft in drafts]
    by_set = {prompt_set_name(source): replayed(folders, verifier, data.rows_of(source), run.chain) for source in sets}
    return [
        Figures(trained, {name: found[number] for name, found in by_set.items()})
        for number, trained in enumerate(drafts)
    ]


def best_of_each(figures: Sequence[Figures], rows: str) -> list[Trained]:
    """Return the draft of each trainer that is best on a set of rows."""
    best: dict[str, Figures] = {}
    for figure in figures:
        other = best.setdefault(figure.trained.key, figure)
        if figure.length(rows) > other.length(rows):
            best[figure.trained.key] = figure
    return [figure.trained for figure in best.values()]


if __name__ == "__main__":
    main()
