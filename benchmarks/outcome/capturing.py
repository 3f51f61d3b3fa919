"""Writing the packed rows of one of our runs for the peers, in its order, with the verifier's states."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import Rows
from torch import Tensor
from transformers import PreTrainedModel

from specforge import SpeculatorModel
from specforge.data.features.dtypes import decode
from specforge.data.features.manifest import FeatureNeeds
from specforge.data.module import DraftDataModule
from specforge.verifier.features import Features, capture
from specforge.verifier.fingerprint import fingerprint
from specforge.verifier.loading import VerifierLoading, load_verifier
from specforge.verifier.parts import VerifierParts


class Run:
    """One of our runs, read from its folder.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.draft = folder / "draft"
        self.last = folder / "checkpoints" / "last.ckpt"
        self.settings: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
        names = ("verifier_dtype", "verifier_revision", "trust_remote_code")
        self.loading = VerifierLoading(*(self.settings[name] for name in names))

    @property
    def verifier_name(self) -> str:
        """Folder or hub id of the verifier."""
        return str(self.settings["verifier"])

    def verifier(self) -> PreTrainedModel:
        """Load the verifier."""
        return load_verifier(self.verifier_name, self.loading)

    def data(self) -> DraftDataModule:
        """Return the run's data, set up."""
        data = DraftDataModule(
            verifier=self.verifier_name,
            verifier_revision=self.loading.revision,
            trust_remote_code=self.loading.trust_remote_code,
            **self.settings["data"],
        )
        data.prepare_data()
        data.setup()
        return data

    def needs(self, verifier: PreTrainedModel, aux_layers: list[int]) -> FeatureNeeds:
        """Return which of the verifier's states the run reads."""
        config = verifier.config.get_text_config()
        mark = fingerprint(self.verifier_name, self.loading)
        sizes = config.num_hidden_layers, config.hidden_size
        return FeatureNeeds(self.verifier_name, mark, tuple(aux_layers), *sizes, whole_rows=False)

    @property
    def chain(self) -> int:
        """Test-time steps of its training."""
        return int(self.settings["model"]["ttt_steps"])

    @property
    def steps(self) -> int:
        """Optimizer steps that the run took."""
        return int(torch.load(self.last, weights_only=True)["global_step"])


def write_rows(run: Run, folder: Path) -> Rows:
    """Write the packed rows that a run was trained on, unless they exist.

    Args:
        run: A finished run of EAGLE-3.
        folder: Folder to write.
    """
    if (folder / "rows.json").exists():
        return Rows.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    verifier, data = run.verifier(), run.data()
    parts = VerifierParts.of(verifier)
    draft = SpeculatorModel.from_pretrained(run.draft, verifier=verifier)
    order = order_of(data, run.steps, run.settings["trainer"]["accumulate_grad_batches"])
    rows = Rows(str(folder), parts.config.vocab_size, run.chain, list(draft.aux_layers), order)
    config = parts.config.to_dict() | {"tie_word_embeddings": False, "dtype": "float32"}
    # safetensors refuses to store one tensor under two names, such as a head that is tied to the embeddings.
    rows.write_verifier(
        config, *(part.weight.float().clone() for part in (parts.embed_tokens, parts.norm, parts.lm_head))
    )
    # If the run read stored states, the peers read the same.
    data.use_features(run.needs(verifier, rows.aux_layers), "fit")
    items = data.train_dataloader().dataset
    chosen = sorted(set(chain.from_iterable(order)))
    for done, number in enumerate(chosen, start=1):
        item = items[number]
        features = states_of(item, verifier, rows.aux_layers)
        row = {
            "input_ids": item["input_ids"],
            "loss_mask": item["loss_mask"],
            "aux": features.aux,
            "last": features.last,
        }
        rows.write_row(number, {**row, "lengths": item["document_ids"].bincount()})
        if done % 100 == 0 or done == len(chosen):
            print(f"  states of {done} of {len(chosen)} packed rows", file=sys.stderr)
    every = torch.arange(rows.vocabulary)
    rows.write(every if draft.draft_ids is None else draft.draft_ids.cpu())
    return rows


def states_of(item: Mapping[str, Tensor], verifier: PreTrainedModel, aux_layers: list[int]) -> Features:
    """Return the verifier's states over a packed row in float32, stored or else captured."""
    if "last" in item:
        stored = (decode(item[name], item.get(f"{name}_scales"), torch.float32) for name in ("aux", "last"))
        return Features(*stored)
    found = capture(verifier, item["input_ids"][None], item["position_ids"][None], aux_layers)
    return Features(found.aux[0].float(), found.last[0].float())


def order_of(data: DraftDataModule, steps: int, batches: int) -> list[list[int]]:
    """Return the packed rows of each optimizer step of a run in one process.

    Args:
        data: The run's data, set up.
        steps: Optimizer steps of the run.
        batches: Batches of an optimizer step.
    """
    sampler = data.train_dataloader().sampler
    size = data.batch_size * batches
    order: list[list[int]] = []
    for epoch in count():
        sampler.set_epoch(epoch)
        epoch_rows = list(sampler)
        order += [epoch_rows[first : first + size] for first in range(0, len(epoch_rows), size)]
        if len(order) >= steps:
            return order[:steps]
    raise AssertionError
