"""The base LightningDataModule of every algorithm."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from specforge.bounds import BatchSize, FeatureType, RowLength, Seed, Share, Workers
from specforge.data.features.manifest import FeatureNeeds, Manifest
from specforge.data.features.reading import RowFeatures, read_from
from specforge.data.features.recording import FeatureRecorder
from specforge.data.features.store import FeatureStore
from specforge.data.features.transports import transport_named
from specforge.data.host_masks import HostMasks
from specforge.data.loader import Batch, PackedSampler, ResumableLoader
from specforge.data.packing import PackedRows, collate, pack
from specforge.data.rows.building import build_rows, is_built
from specforge.data.rows.reading import TokenRows
from specforge.data.rows.summary import MAX_BAD_SHARE, RowSettings
from specforge.data.text.encoding import RowEncoder
from specforge.data.text.sources import check_source
from specforge.data.text.verifier import VerifierTokenizer
from specforge.errors import UsageError
from specforge.private.lightning import make_loadable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
LIVE, RECORD, SERVER = "live", "record", "server"
# Processes that load states by default; for an accelerator they read and check some gigabytes a second together.
MOST_WORKERS = 4


def data_of(trainer: Trainer) -> DraftDataModule:
    """Return the data that a trainer was given.

    Raises:
        UsageError: It was given loaders, which know neither rows nor vocabulary.
    """
    data = getattr(trainer, "datamodule", None)  # an attribute that Lightning sets and does not declare
    if data is None:
        raise UsageError("a draft is trained on a DraftDataModule: trainer.fit(module, datamodule=data)")
    return cast(DraftDataModule, data)


class DraftDataModule(LightningDataModule):
    """Training data of a draft: text rows are tokenised once, cached, packed and batched.

    A source is a .jsonl, .json or .parquet file (also .gz) or a folder of them, a folder written by specforge prepare
    rows (used as it is), a folder of datasets.save_to_disk, or a hub data set as owner/name or owner/name:split. A row
    holds ``messages``, ShareGPT ``conversations``, ``prompt`` and ``response`` or ``completion``, ``instruction`` and
    ``output``, ``text``, or ``input_ids`` and ``loss_mask``.

    Args:
        verifier: Hub name or folder of the verifier, for its tokenizer, chat template and vocabulary size.
        train: Source of the training rows.
        validation: Source of the validation rows. Default: a share of the training rows is held out.
        test: Source of the test rows.
        validation_share: Share of training rows held out if there is no validation source, below 1. 0 holds out none.
        max_length: Longest row in tokens, at least 2, and the capacity of a packed row.
        long_rows: How to treat longer rows: truncate cuts them at the end, drop leaves them out. Both are counted.
        bad_rows: How to treat rows that cannot be trained on: drop leaves them out and counts them, refuse fails at
            the first.
        max_bad_share: Share of bad rows allowed in a source, below 1. More bad rows end the run.
        supervise_prompts: Whether training learns what the verifier predicts in prompts, too, not only in replies.
            Improves drafts if prompts are natural text and steps are few; takes more time per step.
        template_arguments: Extra arguments of the chat template, such as enable_thinking: false.
        template_date: Date that the chat template prints as today, such as 2026-11-29. Default: the day of the build.
        packing: Whether to join several documents in one row. Neither attention nor training steps cross documents.
        batch_size: Rows (with packing: packed rows) per batch on each device.
        num_workers: Processes per device that load batches. 0 loads in the training process. Default: 4 that ask
            servers for states; up to 4 if an accelerator reads stored states, which are hundreds of megabytes a batch;
            otherwise 0.
        seed: Seed of the order of the training rows and of the choice of held-out rows.
        features: Where the verifier's states come from. live runs the verifier on each batch, record stores the states
            of the first epoch for the next epochs and later runs, server asks serving engines for them while it
            trains, and a folder that specforge prepare features wrote is read.
        feature_servers: With features: server, the URLs of the servers, such as [http://host:8000/v1]; num_workers
            processes ask them ahead of training.
        feature_transport: How states come from servers: file (default), fp8, mooncake, or by a plugin.
        record: With features: server, a folder to store the states in that came, in bfloat16. Rows that are stored
            there are not asked for again, and later runs can read it with features: FOLDER.
        cache_dir: Folder of the tokenised rows. Default: rows in $SPECFORGE_CACHE, or in ~/.cache/specforge.
        verifier_revision: Branch, tag or commit of the verifier on the hub.
        trust_remote_code: Whether to run code shipped with the verifier's tokenizer and configuration.
    """

    def __init__(
        self,
        verifier: str,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        validation_share: Share = 0.05,
        max_length: RowLength = 2048,
        long_rows: Literal["truncate", "drop"] = "truncate",
        bad_rows: Literal["drop", "refuse"] = "drop",
        max_bad_share: Share = MAX_BAD_SHARE,
        supervise_prompts: bool = False,
        template_arguments: dict[str, Any] | None = None,
        template_date: str | None = None,
        packing: bool = True,
        batch_size: BatchSize = 1,
        num_workers: Workers | None = None,
        seed: Seed = 42,
        features: str = LIVE,
        feature_servers: list[str] | None = None,
        feature_transport: str = "file",
        record: str | None = None,
        cache_dir: str | None = None,
        verifier_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        make_loadable(self.hparams)
        self._sources = {"train": train, "validation": validation, "test": test}
        for split, source in self._sources.items():
            if source is not None:
                check_source(source, f"data.{split}")
        self.verifier = verifier
        self.validation_share = validation_share
        self.row_settings = RowSettings(max_length, long_rows, bad_rows, max_bad_share)
        self.supervise_prompts = supervise_prompts
        self.packing = packing
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.features = features
        self.feature_servers = feature_servers or []
        self.feature_transport = feature_transport
        self.record = record
        if record is not None and features != SERVER:
            raise UsageError(
                f"data.record: only states of data.features: {SERVER} are stored in a folder of choice; set "
                f"data.features: {RECORD} to store those of a verifier in this process, or omit data.record"
            )
        if self.feature_servers and features in (LIVE, RECORD):
            _log.warning("data.feature_servers are not asked, since data.features is %s, not %s", features, SERVER)
        if features == SERVER:
            # The client takes a second to import.
            from specforge.data.features.servers import check_urls

            check_urls(self.feature_servers)
            transport_named(feature_transport)
        elif features not in (LIVE, RECORD):
            try:
                Manifest.read(Path(features))
            except UsageError as error:
                raise UsageError(
                    f"data.features: {error}; allowed: {LIVE}, {RECORD}, {SERVER}, or a folder that specforge "
                    "prepare features wrote"
                ) from None
        self._caches = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.cache_dir = self._caches if cache_dir else self._caches / "rows"
        self._text = VerifierTokenizer(
            verifier, verifier_revision, trust_remote_code, template_arguments, template_date
        )
        self._packed: dict[str, PackedRows] = {}
        self._feature_lines: list[str] = []
        self.recorder: FeatureRecorder | None = None
        """Records states of training, with ``data.features: record`` or ``data.record``; otherwise None."""
        if TYPE_CHECKING:
            # Not above: jsonargparse runs these imports of a module, and the client takes a second to import.
            from specforge.data.features.servers import StateServers
        self._servers: StateServers | None = None

    @property
    def sources(self) -> list[str]:
        """The distinct sources of all splits."""
        return list(dict.fromkeys(source for source in self._sources.values() if source is not None))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The verifier's tokenizer, loaded on first use; token rows do not need it."""
        return self._text.tokenizer

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the verifier's tokenizer and chat template; None if they cannot be loaded."""
        try:
            return RowEncoder(self._text.template, self.vocabulary_size).tokenizer_digest
        except UsageError:
            return None

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size V of the verifier."""
        return self._text.vocabulary_size

    @property
    def train_rows(self) -> TokenRows:
        """The training rows without held-out rows; available after ``setup``."""
        return self._packed["train"].rows

    @property
    def validation_rows(self) -> TokenRows | None:
        """The validation rows; None if there are none."""
        return self._packed["validation"].rows if "validation" in self._packed else None

    @property
    def test_rows(self) -> TokenRows | None:
        """The test rows; None if there are none."""
        return self._packed["test"].rows if "test" in self._packed else None

    @property
    def is_built(self) -> bool:
        """Whether the rows of every source are already built, so that ``setup`` only opens them."""
        return all(
            is_built(source, lambda: self._text.template, self.vocabulary_size, self.row_settings, self.cache_dir)
            for source in self._sources.values()
            if source is not None
        )

    def prepare_data(self) -> None:
        """Build the caches; Lightning calls this in one process per node."""
        for split in self._sources:
            self._build(split)

    def setup(self, stage: str | None = None) -> None:
        """Open the caches and pack the rows."""
        if self._packed:
            return
        rows = {split: built for split in self._sources if (built := self._build(split)) is not None}
        if "validation" not in rows and self.validation_share > 0:
            rows["train"], rows["validation"] = self._hold_out(rows["train"])
        if self.supervise_prompts:
            rows["train"] = rows["train"].supervising_prompts()
        self._packed = {split: PackedRows(documents, self._bins(documents)) for split, documents in rows.items()}

    def use_features(self, needs: FeatureNeeds, stage: str) -> bool:
        """Attach stored verifier states to the rows; must be called before the loaders are made.

        Args:
            needs: Which states are read.
            stage: Stage of the run: fit, validate or test.

        Returns:
            Whether all states of this stage are stored or asked for, so that the verifier need not run.

        Raises:
            UsageError: The store is damaged, of another verifier or tokenizer, or lacks layers or training rows.
            SpecforgeError: A server cannot be reached, or does not give the states that are needed.
        """
        if self.features == LIVE:
            return False
        stages = {"validation": ("fit", "validate"), "test": ("test",)}
        splits = {split: one for split, one in self._packed.items() if stage in stages.get(split, ("fit",))}
        if self.features == SERVER:
            self._use_servers(needs, splits)
            return True
        if self.features == RECORD:
            manifest = self.feature_manifest(needs, "bfloat16")
            self.recorder = FeatureRecorder(self._caches / "features" / manifest.name, manifest, needs, splits)
            self._feature_lines = [f"features: {self.recorder.summary_text()}"]
            return self.recorder.reopen()
        where = f"data.features: {self.features}"
        store = FeatureStore(Path(self.features))
        store.manifest.require(needs, self.tokenizer_digest, where)
        missing = {split: int(read_from(store, needs, one).sum()) for split, one in splits.items()}
        if missing.get("train"):
            raise UsageError(
                f"{where} lacks {missing['train']:,} of the {len(self.train_rows):,} rows of data.train; prepare "
                "features with the same sources and data.max_length, or set data.features: live"
            )
        self._feature_lines = [f"features: {store.summary_text()}"]
        self._feature_lines += [
            f"  {number:,} of the {len(splits[split].rows):,} {split} rows are missing: the verifier runs on them"
            for split, number in missing.items()
            if number
        ]
        return not any(missing.values())

    def _use_servers(self, needs: FeatureNeeds, splits: dict[str, PackedRows]) -> None:
        from specforge.data.features.servers import StateServers

        rows = self.train_rows
        self._servers = StateServers(self.feature_servers, self.feature_transport, needs)
        self._servers.check(rows[0]["input_ids"].numpy())
        for items in splits.values():
            items.features = replace(RowFeatures.of(items.rows, needs), servers=self._servers)
        self._feature_lines = [f"features: {self._servers.summary_text()}"]
        if self.record is not None:
            manifest = self.feature_manifest(needs, "bfloat16")
            self.recorder = FeatureRecorder(Path(self.record), manifest, needs, splits)
            self.recorder.store.check_folder("data.record")
            self.recorder.reopen()
            self._feature_lines.append(f"  {self.recorder.summary_text()}")
        if self.num_workers == 0:
            _log.warning(
                "data.num_workers is 0: each batch waits for its states. Set it to 4 or more, to ask for them ahead"
            )

    def feature_manifest(self, needs: FeatureNeeds, dtype: FeatureType) -> Manifest:
        """Return the manifest of a store for this run, without rows and shards.

        Args:
            needs: Which states are read.
            dtype: Storage type.
        """
        return Manifest(
            verifier=needs.verifier,
            fingerprint=needs.fingerprint,
            tokenizer=self.tokenizer_digest,
            vocabulary_size=self.vocabulary_size,
            layers=needs.layers,
            width=needs.width,
            dtype=dtype,
            whole_rows=needs.whole_rows,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Keep a batch's masks on the CPU as well, before Lightning moves the batch; record states of servers."""
        if self._servers is not None and self.recorder is not None and "last" in batch:
            self.recorder.add(batch, batch["aux"], batch["last"])
        return HostMasks.kept(batch)

    def teardown(self, stage: str) -> None:
        """Delete what lost answers have left on the servers."""
        if self._servers is not None:
            self._servers.sweep()

    def on_exception(self, exception: BaseException) -> None:
        """Do the same if the run ends early."""
        self.teardown("fit")

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of this rank's training batches, reshuffled each epoch."""
        loader = self._loader("train", shuffle=True)
        if self.trainer is not None:
            loader.window_end = self._window_end
        return loader

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the loader of this rank's validation batches; an empty list if there are no validation rows."""
        return self._loader("validation", shuffle=False) if "validation" in self._packed else []

    def test_dataloader(self) -> ResumableLoader:
        """Return the loader of this rank's test batches.

        Raises:
            UsageError: ``data.test`` is not set.
        """
        if "test" not in self._packed:
            raise UsageError("data.test is not set; give a source of test rows")
        return self._loader("test", shuffle=False)

    def vocabulary_counts(self) -> Tensor:
        """Return how often each token id is supervised in the training rows, int64 [V]."""
        return self.train_rows.supervised_counts

    def summary_text(self) -> str:
        """Return a readable summary: rows kept, truncated and dropped, and how full the packed rows are."""
        lines = [self._split_summary(split, packed) for split, packed in self._packed.items()]
        return "\n".join(lines + self._feature_lines)

    def _split_summary(self, split: str, packed: PackedRows) -> str:
        summary = packed.rows.summary
        share = summary.supervised_tokens / summary.tokens
        left_out = {**summary.dropped, **{f"bad: {reason}": one.count for reason, one in summary.bad.items()}}
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "none"
        fill_share = packed.fill_share(self.row_settings.max_length)
        packing = f"; {len(packed):,} packed rows, {fill_share:.1%} full" if self.packing else ""
        return (
            f"{split}: {summary.rows:,} rows, {summary.tokens:,} tokens, {share:.1%} supervised{packing}\n"
            f"  of {self._sources[split] or self._sources['train']}: {summary.truncated:,} truncated to "
            f"{self.row_settings.max_length:,} tokens; dropped: {dropped}"
        )

    def rows_of(self, source: str) -> TokenRows:
        """Return the token rows of a source, from the cache if it has them."""
        return build_rows(source, lambda: self._text.template, self.vocabulary_size, self.row_settings, self.cache_dir)

    def _build(self, split: str) -> TokenRows | None:
        source = self._sources[split]
        return None if source is None else self.rows_of(source)

    def _hold_out(self, rows: TokenRows) -> tuple[TokenRows, TokenRows]:
        """Hold out the last share of the shuffled chats, at least one; all rows of a chat stay together."""
        _, first, chats = np.unique(rows.chats, return_index=True, return_inverse=True)
        if len(first) < 2:
            raise UsageError(
                "data.validation_share: one row, or the rows of one chat, cannot be split; set it to 0, or give "
                "data.validation"
            )
        number = np.argsort(np.argsort(first))[chats]  # index of each row's chat, in order of appearance
        order = np.random.default_rng(self.seed).permutation(len(first))
        kept = max(1, min(len(first) - 1, round(len(first) * (1 - self.validation_share))))
        is_kept = np.isin(number, order[:kept])
        # In file order, consecutive reads are close together on disk.
        return rows.select(np.flatnonzero(is_kept)), rows.select(np.flatnonzero(~is_kept))

    def _bins(self, rows: TokenRows) -> list[list[int]]:
        return pack(rows.lengths, self.row_settings.max_length) if self.packing else [[row] for row in range(len(rows))]

    def _window_end(self, index: int) -> int:
        """Return the index of the first batch after the optimizer step that the given batch belongs to."""
        assert self.trainer is not None
        accumulated = self.trainer.accumulate_grad_batches
        return min((index // accumulated + 1) * accumulated, int(self.trainer.num_training_batches))

    def _loader(self, split: str, shuffle: bool) -> ResumableLoader:
        items = self._packed[split]
        # Only Lightning knows which ranks read different data: under tensor parallelism several ranks share it.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"rank": 0, "num_replicas": 1}
        sampler = PackedSampler(
            items, shuffle=shuffle, seed=self.seed, rank=ranks["rank"], world_size=ranks["num_replicas"]
        )
        workers = self._workers(items) if self.num_workers is None else self.num_workers
        return ResumableLoader(
            items,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context=self._servers.process_context if self._servers and workers else None,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that starting an epoch draws nothing from the global generator
        )

    def _workers(self, items: PackedRows) -> int:
        """Return the number of processes that load items by default."""
        if self._servers is not None:
            return MOST_WORKERS  # they wait for answers, and hardly compute
        if items.features is None or self.trainer is None or self.trainer.strategy.root_device.type == "cpu":
            return 0
        return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // self.trainer.num_devices))


def default_cache() -> Path:
    """Return the folder of all caches: $SPECFORGE_CACHE, or ~/.cache/specforge."""
    return Path(os.environ.get("SPECFORGE_CACHE") or "~/.cache/specforge").expanduser()
