"""The MLP speculator's data: ordinary rows in stage 1, text of the verifier's own in stage 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain
from typing import Any, cast

import numpy as np

from specforge.data.loader import Batch, ResumableLoader
from specforge.data.module import DraftDataModule
from specforge.data.packing import collate
from specforge.data.text.sources import check_source
from specforge.errors import UsageError
from specforge_mlp.module import MLPModule
from specforge_mlp.stage_two import ahead, check_lengths, cut_prompts, write_on


class MLPDataModule(DraftDataModule):
    """Rows of text for training an MLP speculator.

    Args:
        stage_two: Source of rows that the verifier wrote, for stage 2. Without one, it writes them during training.
    """

    def __init__(self, stage_two: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if stage_two is not None:
            check_source(stage_two, "data.stage_two")
        self._sources["stage_two"] = stage_two

    def setup(self, stage: str | None = None) -> None:
        """Open and pack the rows, once it is clear that they go with the settings of stage 2."""
        if self.trainer is not None:
            prepared, settings = self._sources["stage_two"], self._module.settings_of_stage_two
            if prepared is not None and settings is None:
                raise UsageError("data.stage_two is set, but there is no stage 2; set model.stage_two, or leave it out")
            if settings is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise UsageError("trainer.overfit_batches trains on the rows alone; set model.stage_two to null")
            if prepared is None and settings is not None:
                if self._module.teacher.sharding:
                    # A thread of each process writes, at its own pace, but a split verifier runs in all at once.
                    raise UsageError(
                        "verifier_sharding: a verifier that is split over processes cannot write in stage 2; prepare "
                        "its text before and set data.stage_two, or set model.stage_two to null"
                    )
                check_lengths(settings, self._module.teacher.config)
        super().setup(stage)

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this rank; those of stage 2 are made while training."""
        loader = super().train_dataloader()
        if self.trainer is not None and self._module.settings_of_stage_two is not None:
            loader.transform = self._two_stages
        return loader

    @property
    def _module(self) -> MLPModule:
        assert self.trainer is not None
        return cast(MLPModule, self.trainer.lightning_module)

    def _two_stages(self, batches: Iterator[Batch], epoch: int, first: int) -> Iterator[Batch]:
        """Pass on the batches of stage 1; from the boundary on, make those of stage 2 out of them."""
        assert self.trainer is not None
        settings = self._module.settings_of_stage_two
        assert settings is not None
        accumulated = self.trainer.accumulate_grad_batches
        steps_before = epoch * math.ceil(self.trainer.num_training_batches / accumulated)
        begin = self._module.first_step_of_stage_two
        make = partial(self._prepared if "stage_two" in self._packed else self._written, epoch)
        numbered = enumerate(batches, first)
        for number, batch in numbered:
            if steps_before + number // accumulated >= begin:
                yield from ahead(make, chain([(number, batch)], numbered), settings.buffer)
                return
            yield batch

    def _written(self, epoch: int, number: int, batch: Batch) -> Batch:
        """Let the verifier write a batch on."""
        settings = self._module.settings_of_stage_two
        assert settings is not None
        seed = np.random.SeedSequence((self.seed, epoch, number, self._ranks[0])).generate_state(1, np.uint32)[0]
        return write_on(self._module.teacher.model, cut_prompts(batch, settings.prompt_length), settings, int(seed))

    def _prepared(self, epoch: int, number: int, batch: Batch) -> Batch:
        """Take a batch of the rows that the verifier wrote before, shuffled anew each time they are through."""
        assert self.trainer is not None
        items = self._packed["stage_two"]
        rank, ranks = self._ranks
        place = (epoch * int(self.trainer.num_training_batches) + number) * ranks + rank
        places = range(place * self.batch_size, (place + 1) * self.batch_size)
        chosen = [_shuffled(self.seed, one // len(items), len(items))[one % len(items)] for one in places]
        return collate([items[item] for item in chosen])

    @property
    def _ranks(self) -> tuple[int, int]:
        """This process's number among those that take different data, and how many they are."""
        assert self.trainer is not None
        ranks = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return ranks["rank"], ranks["num_replicas"]


@lru_cache(maxsize=2)
def _shuffled(seed: int, turn: int, size: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, turn)).permutation(size).tolist()
    return order
