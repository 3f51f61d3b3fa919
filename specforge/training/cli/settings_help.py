"""``specforge fit --algorithm NAME --help``: model and data first, each key with its values, default and meaning."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from specforge.hookspecs import Objective, Weighting
from specforge.registry import installed
from specforge.training.cli.numbers import accept_in_files
from specforge.training.cli.settings import Setting, settings

INDENT = " " * 6
SECTIONS = ("model", "data", "trainer", "callbacks")
# The keys whose values are names that plugins register.
NAMES = {"model.objective": Objective, "model.weighting": Weighting}
# Lightning explains its keys at length, and allows more than a draft can be trained with.
TRAINER = {
    "accelerator": "cpu, gpu, mps, or auto, which uses what there is.",
    "devices": "Number of devices on each node, a list of their numbers, or auto for all.",
    "num_nodes": "Number of machines.",
    "strategy": "auto, ddp, or fsdp2, which shards the draft over all processes.",
    "precision": "32-true, bf16-mixed (computes in bfloat16, keeps weights in float32) or 64-true.",
    "max_epochs": "Passes over the training rows; -1 for no limit but max_steps.",
    "max_steps": "Optimizer steps; -1 for no limit but max_epochs.",
    "max_time": "Longest time, as days:hours:minutes:seconds.",
    "val_check_interval": "Validate after this many batches, this share of an epoch, or this time.",
    "check_val_every_n_epoch": "Validate in every n-th epoch; null counts batches across epochs.",
    "limit_train_batches": "Use only this many batches, or this share, of each epoch.",
    "limit_val_batches": "The same for each validation.",
    "accumulate_grad_batches": "Batches for each optimizer step.",
    "gradient_clip_val": "Largest norm of the gradient.",
    "log_every_n_steps": "Optimizer steps between two points of a curve; null: 50.",
    "logger": "Class of a logger, or a list of them; null: TensorBoard. See docs/tensorboard.md.",
    "callbacks": "Further callbacks of your own.",
    "fast_dev_run": "Try a few batches, and store nothing.",
}
EXPLAINED_ELSEWHERE = "https://lightning.ai/docs/pytorch/stable/common/trainer.html"


class SettingsParser(LightningArgumentParser):
    """A parser whose help fits the terminal and says what a person needs to choose a value.

    Args:
        *args: Arguments of Lightning's parser.
        **kwargs: Further arguments of it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        accept_in_files()
        super().__init__(*args, **kwargs)

    def format_help(self, formatter: Any = None) -> str:
        """Return the help."""
        found = list(settings(self))
        parts = [
            f"usage: {self.usage}",
            _wrapped(str(self.description)),
            _wrapped("Each key is a flag, --data.seed 1, and a key of a YAML file, data: {seed: 1}."),
        ]
        run = [one for one in found if one.key.partition(".")[0] not in SECTIONS]
        for name in SECTIONS:
            own = [one for one in found if one.key.startswith(f"{name}.")]
            parts.append(_trainer(own) if name == "trainer" else _section(self._title(name), own))
            if name == "data":
                parts.append(_section("The run", run))
        parts.append(
            "  -c, --config FILE\n      A YAML file; give several, and later ones override earlier ones.\n"
            "  --print_config\n      Print the complete resolved configuration, and exit."
        )
        return "\n\n".join(parts) + "\n"

    def _title(self, group: str) -> str:
        return str((self.groups or {})[group].title)


def _section(title: str, found: list[Setting]) -> str:
    return "\n".join([_wrapped(f"{title}:"), *map(_entry, found)])


def _entry(one: Setting) -> str:
    default = "required" if one.default is None else f"default: {one.default}"
    # The class of a callback is its default, and tells nothing.
    noted = "" if one.key.startswith("callbacks.") else f"  ({one.values}; {default})"
    head = _wrapped(f"--{one.key}{noted}", "  ", INDENT)
    names = f" Names: {', '.join(sorted(installed().all(NAMES[one.key])))}." if one.key in NAMES else ""
    return "\n".join([head, _wrapped(one.meaning + names, INDENT, INDENT)])


def _trainer(found: list[Setting]) -> str:
    explained = [Setting(one.key, "", one.default, text) for one in found if (text := TRAINER.get(_name(one)))]
    others = ", ".join(_name(one) for one in found if _name(one) not in TRAINER)
    return "\n".join(
        [
            "Lightning's trainer:",
            *(f"  --{one.key}  (default: {one.default})\n{_wrapped(one.meaning, INDENT, INDENT)}" for one in explained),
            _wrapped(f"Also: {others}. See {EXPLAINED_ELSEWHERE}", "  ", "  "),
        ]
    )


def _name(one: Setting) -> str:
    return one.key.rpartition(".")[2]


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )
