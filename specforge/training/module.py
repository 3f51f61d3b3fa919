"""The base of every algorithm's LightningModule: a batch, the loss, the optimizer, the metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from specforge.bounds import Decay, VerifierType
from specforge.data.features.manifest import FeatureNeeds
from specforge.data.host_masks import HostMasks
from specforge.data.module import DraftDataModule, data_of
from specforge.errors import SpecforgeError, UsageError
from specforge.models.chain.alignment import Alignment, align
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import SpeculatorModel
from specforge.moving import begin_read, moved
from specforge.private.lightning import has_trainer, is_accumulating, logs_now, make_loadable
from specforge.sampling import Sampling
from specforge.training.denominator import Denominator, Kind
from specforge.training.figures import BarFigures, StepFigures
from specforge.training.identity import Identity, draft_in, refuse_another_draft, start_from
from specforge.training.length import RunLength
from specforge.training.losses.comparison import Term
from specforge.training.losses.distillation import DraftSteps, Labels, Teacher, distill
from specforge.training.losses.fused import why_not_fused
from specforge.training.losses.named import chain_weighting, objective_terms
from specforge.training.metrics import StageMetrics
from specforge.training.optimizers import OptimizerSettings, build_optimizer
from specforge.training.schedules import ScheduleSettings, build_schedule
from specforge.training.steps import prepare_steps
from specforge.training.teacher import FrozenVerifier
from specforge.training.totals import processes
from specforge.verifier.features import Features
from specforge.verifier.loading import VerifierLoading
from specforge.verifier.parts import VerifierParts

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Drafted:
    """A draft's states for a batch, and the targets that they are compared with.

    Attributes:
        states: The draft's states at the pairs of row and step that were run, [P, H].
        state_index: Index of each row's and step's state, int64 [S, N], on the CPU; -1 if it was not run. Move indices
            to a device with ``specforge.moving.moved``.
        targets: Row of the verifier's states that each row and step is compared with, int64 [S, N], on the CPU.
        supervised: Which of them count, bool [S, N], on the CPU.
    """

    states: Tensor
    state_index: Tensor
    targets: Tensor
    supervised: Tensor

    def counted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return step, row, state and target of the pairs that count, int64 [m] each, on the device of the states."""
        steps, rows = self.supervised.nonzero(as_tuple=True)
        return moved((steps, rows, self.state_index[steps, rows], self.targets[steps, rows]), self.states.device)


class DraftModule(LightningModule, ABC):
    """Trains a draft for a verifier; a plugin supplies the network and whatever its paper does differently.

    A batch is aligned (``alignment``), the needed rows are run (``states``), and each pair of row and step that counts
    is compared with the verifier: by the objective (``loss_terms``) and the algorithm's own losses
    (``further_losses``), times the pair's weight (``pair_weights``).

    Args:
        verifier: Folder or hub id of the verifier.
        verifier_dtype: Dtype of its weights; auto is the stored dtype, but float32 without an accelerator
            or a processor with AMX.
        verifier_revision: Branch, tag or commit of the verifier on the hub.
        trust_remote_code: Whether to run model code from the verifier's repository.
        verifier_sharding: Whether to split the verifier's layers over all processes, if it does not fit in each.
        objective: Weights of the losses to add up, by name (see ``specforge plugins`` for the names).
        step_decay: Draft step k is weighted by this number to the power of k.
        weighting: Name of a further weight of each position and step in training, which depends on the earlier steps
            of the chain (see ``specforge plugins``). Set step_decay to 1 to use only this one. Null for none.
        denominator: Divisor of a step's sum of losses: the number of its supervised positions (valid), or of all
            positions of the batch, including padding and prompts (all).
        optimizer: The optimizer.
        schedule: The learning-rate schedule.
        init_from: Draft to start from, a folder or hub id, instead of a new one; it must have the same network.
        activation_checkpointing: Whether to recompute each draft step in the backward pass instead of keeping its
            activations. Takes more time and much less memory.
        compile: Whether to compile the draft's steps and the losses with torch.compile. Slows the start of the run.
    """

    draft: SpeculatorModel

    def __init__(
        self,
        verifier: str,
        verifier_dtype: VerifierType = "auto",
        verifier_revision: str | None = None,
        trust_remote_code: bool = False,
        verifier_sharding: bool = False,
        objective: dict[str, float] = {"kl": 1.0},  # noqa: B006  (never changed; shown as the default in --help)
        step_decay: Decay = 0.8,
        weighting: str | None = None,
        denominator: Kind = "valid",
        optimizer: OptimizerSettings = OptimizerSettings(),
        schedule: ScheduleSettings = ScheduleSettings(),
        init_from: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        make_loadable(self.hparams)
        loading = VerifierLoading(verifier_dtype, verifier_revision, trust_remote_code)
        self.teacher = FrozenVerifier(verifier, loading, verifier_sharding)
        self.terms = objective_terms(objective)
        self.step_decay = step_decay
        self.weighting = None if weighting is None else chain_weighting(weighting)
        self.denominator = Denominator(denominator)
        self.optimizer_settings = optimizer
        self.schedule_settings = schedule
        self.init_from = init_from
        self.starts_from: str | None = None
        """Description of the weights that the draft was initialised with; None if they are new."""
        self.activation_checkpointing = activation_checkpointing
        self.compile_steps = compile
        self._figures = StepFigures()
        self._bar = BarFigures()
        # Loss, means and learning rate of the latest step.
        self._latest: tuple[Tensor, dict[str, Tensor], float]
        # The loss, and the states that it was computed from.
        self._unchecked: Any = None
        # States of a batch that were read before its step.
        self._next_features: Features | None = None

    @property
    @abstractmethod
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Number S of draft steps that are trained."""

    @property
    def reads_whole_rows(self) -> bool:
        """Whether the verifier's states after a row's last supervised token are read; False by default."""
        return False

    @property
    def reads_row_ends(self) -> bool:
        """Whether the states of a row's last supervised token and of the one after it are read; False by default."""
        return False

    @property
    def runs_verifier(self) -> bool:
        """Whether the verifier is run even if all states are stored; False by default."""
        return False

    @property
    def validation_steps(self) -> int:
        """Number of draft steps that validation runs; ``num_steps`` by default."""
        return self.num_steps

    @abstractmethod
    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> SpeculatorModel:
        """Create the network with its initial weights, attached to the verifier's parts.

        Args:
            parts: The verifier's embeddings, norm and head.
            data: The data module, set up; it counts how often each token is supervised.
        """

    def draft_steps(self, batch: Batch, features: Features) -> DraftSteps:
        """Run the draft over a packed batch and compare each step with the verifier.

        Args:
            batch: ``input_ids``, ``loss_mask``, ``document_ids`` and ``position_ids``, [B, T] each.
            features: The verifier's states over the batch.
        """
        host, device = HostMasks.of(batch), features.last.device
        alignment = self.alignment(host.masks)
        targets, supervised = alignment.targets.flatten(1), alignment.supervised.flatten(1)
        self.denominator.begin(supervised, self.device)
        rows = DraftRows.needed(supervised, host.documents)
        drafted = Drafted(self.states(batch, features, rows.to(device)), rows.state_index(), targets, supervised)
        weights = self.pair_weights(supervised).to(device, non_blocking=True)
        outcome = distill(
            self.draft.before_head(drafted.states),
            self.draft.head_weights,
            Teacher(features.last.flatten(0, 1), self.teacher.parts, self.draft.draft_ids),
            targets,
            supervised,
            self.loss_terms,
            weights,
            labels=self.labels(batch),
            finish=self.draft.finish,
            state_index=drafted.state_index,
            compiled=self.compile_steps,
            weighting=self.weighting if self.training else None,
            further_head=self.draft.further_head,
            candidates=self.candidates,
        )
        outcome = self.measured(batch, features, drafted, outcome)
        for name, values in self.further_losses(features, drafted, outcome).items():
            loss = outcome.loss + self.term_weights[name] * (weights * values).sum()
            outcome = replace(outcome, loss=loss, terms={name: values.detach().sum(1), **outcome.terms})
        return outcome

    def states(self, batch: Batch, features: Features, rows: DraftRows) -> Tensor:
        """Run the draft's steps at the rows that are needed; override it if training runs them differently.

        Args:
            batch: See ``draft_steps``.
            features: The verifier's states over the batch.
            rows: The rows that each step runs.

        Returns:
            The states, concatenated step by step, [P, H].
        """
        return self.draft.states(batch, features, rows)

    @property
    def loss_terms(self) -> list[Term]:
        """The terms of the objective; override this if they depend on more than the configuration."""
        return self.terms

    def pair_weights(self, supervised: Tensor) -> Tensor:
        """Return the weight of each row and step in the loss, [S, N]; by default ``step_weights``.

        Args:
            supervised: Which of them count, bool [S, N], on the CPU.
        """
        return self.step_weights(supervised)[:, None].expand_as(supervised)

    def further_losses(self, features: Features, drafted: Drafted, outcome: DraftSteps) -> dict[str, Tensor]:
        """Return terms of the loss besides the objective; none by default.

        Args:
            features: The verifier's states over the batch.
            drafted: The draft's states, with their gradient.
            outcome: Their comparison with the verifier.

        Returns:
            For each name that ``term_weights`` adds to the objective, its value at each row and step, [S, N], with
            gradient; 0 for pairs that do not count.
        """
        return {}

    def measured(self, batch: Batch, features: Features, drafted: Drafted, outcome: DraftSteps) -> DraftSteps:
        """Return the outcome as decoding has it; overridden where drafts do not choose by the logits that are trained.

        Args:
            batch: See ``draft_steps``.
            features: The verifier's states over the batch.
            drafted: What the draft computed.
            outcome: How it compares with the verifier.
        """
        return outcome

    def alignment(self, batch: Batch) -> Alignment:
        """Return the target of each row and step, and which of them count.

        An algorithm that counts other positions overrides this: if an optimizer step has several batches, their losses
        are divided by the number of positions that count in all of them.

        Args:
            batch: ``loss_mask`` and ``document_ids``, [B, T] each, on the CPU.
        """
        steps = self.num_steps if self.training else self.validation_steps
        return align(batch["loss_mask"], batch["document_ids"], steps)

    @property
    def candidates(self) -> int:
        """Number of the draft's most probable tokens at each pair that ``further_losses`` reads; mostly none."""
        return 0

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each term of the loss, by name; a plugin adds its own to those of the objective."""
        return {term.name: term.weight for term in self.terms}

    @property
    def mean_weights(self) -> list[float]:
        """Factor of each trained step's mean in the loss of validation and test; a plugin's losses may have others."""
        return [self.step_decay**step for step in range(self.num_steps)]

    @property
    def unestimated_costs(self) -> list[str]:
        """Costs that ``specforge estimate`` does not model, one sentence each; none by default."""
        return []

    @cached_property
    def feature_needs(self) -> FeatureNeeds:
        """The verifier states that are read; cached, because the fingerprint opens all files of the verifier."""
        return self.teacher.needs(self.aux_layers, self.reads_whole_rows, self.reads_row_ends)

    def configure_model(self) -> None:
        """Load the verifier, or only its parts if all states are stored, and create the draft, once.

        Nothing is created without a trainer: ``load_from_checkpoint`` builds the draft from the checkpoint, and a run
        with such a module starts from these weights.
        """
        if self.teacher.is_held or not has_trainer(self):
            return
        loaded: SpeculatorModel | None = getattr(self, "draft", None)
        # Lightning makes the run's device the default here; data that is read and counted belongs on the CPU.
        with torch.device("cpu"):
            data = data_of(self.trainer)
            all_stored = data.use_features(self.feature_needs, self.trainer.state.fn or "fit")
            self.teacher.recorder = data.recorder
            device, whole = self.trainer.strategy.root_device, self.runs_verifier or not all_stored
            self.teacher.load(device, whole, data.packing)
            self.create_draft(data)
            if (stored := self.draft.config.speculators_config) is not None:
                stored.verifier.fingerprint = self.feature_needs.fingerprint
            given = loaded if loaded is not None else self.init_from
            if given is not None:
                start_from(self.draft, given)
                self.starts_from = self.init_from if loaded is None else "the checkpoint that was loaded"
            self.adapt_draft()
            for stage, metrics in self.means.items():
                self.add_module(f"{stage}_means", metrics)

    def create_draft(self, data: DraftDataModule) -> None:
        """Create the draft for the verifier, which must be loaded.

        Args:
            data: The data module, set up; it counts how often each token is supervised.
        """
        self.draft = self.build_draft(self.teacher.parts, data)
        prepare_steps(self.draft, self.activation_checkpointing, self.compile_steps)

    def configure_callbacks(self) -> list[Callback]:
        """Return the run's callbacks that the trainer was not given (see ``RunCallbacks.missing_in``)."""
        # Callbacks import the module that they watch; this is the only import in the other direction.
        from specforge.training.callbacks.fit import RunCallbacks

        return RunCallbacks.missing_in(self.trainer)

    def adapt_draft(self) -> None:
        """Change the network for training, after its weights are initialised; does nothing by default."""

    @cached_property
    def means(self) -> dict[str, StageMetrics]:
        """The metrics of ``val`` and ``test``; available once the data are set up."""
        data = data_of(self.trainer)
        verifier = self.feature_needs.fingerprint
        terms = list(self.term_weights)
        return {
            stage: StageMetrics(terms, self.validation_steps, rows, verifier)
            for stage, rows in (("val", data.validation_rows), ("test", data.test_rows))
        }

    @property
    def monitor(self) -> str:
        """The validation metric that checkpoints are chosen by; higher is better."""
        return f"val/acceptance_length{self.means['val'].suffix}"

    def summary_text(self) -> str:
        """Return a short summary: the draft and its verifier."""
        trained = sum(one.numel() for one in self.draft.parameters() if one.requires_grad)
        whole = self.teacher.whole
        frozen = f"of {sum(one.numel() for one in whole.parameters()):,}" if whole else "by its stored states"
        lines = [f"draft: {trained:,} trained parameters, for {self.teacher.name} {frozen}"]
        if self.starts_from is not None and self.trainer.ckpt_path is None:
            lines.append(
                f"  starts from the weights of {self.starts_from}; optimizer and schedule start from step 0. "
                "To continue a run with both, resume it with --ckpt_path"
            )
        if self.device.type == "cuda":
            reason = why_not_fused(self.device, torch.bfloat16, self.terms, self.weighting)
            lines.append(f"  losses by operations of torch: {reason}" if reason else "  losses by kernels of Triton")
        if reason := self.means["val"].why_proxy:
            lines.append(f"  {self.monitor} is not exact: validation {reason}")
        return "\n".join(lines)

    def features(self, batch: Batch) -> Features:
        """Return the verifier's states over a batch."""
        return self.teacher.states(batch, self.aux_layers, HostMasks.of(batch).documents)

    def features_ahead(self, batch: Batch) -> Features:
        """Return the states of the batch whose step is next; the step reuses them."""
        with self.trainer.precision_plugin.forward_context():
            self._next_features = self.features(batch)
        return self._next_features

    def labels(self, batch: Batch) -> Labels | None:
        """Return the text's next tokens if decoding is replayed or a loss reads them; otherwise None."""
        weighting_uses_text = self.weighting is not None and self.weighting.uses_text
        if self.training and not weighting_uses_text and not any(term.uses_text for term in self.terms):
            return None
        # Decoding is replayed only in validation.
        sampling = Sampling() if self.training else self.means[self._stage].sampling
        return Labels(batch["input_ids"].flatten().roll(-1), sampling)

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    def step_weights(self, supervised: Tensor) -> Tensor:
        """Return the weight of each step's sum of losses, [S]: decay divided by the denominator.

        Args:
            supervised: Which positions count, bool [S, N], on the CPU.
        """
        counts = self.step_counts(supervised)
        # Gradients are averaged over the processes, which may hold different numbers of positions.
        return self.step_decays(len(supervised)) * processes() / counts.clamp(min=1)

    def step_decays(self, steps: int) -> Tensor:
        """Return the weight of each step, [S]: ``step_decay`` to the power of its number.

        Args:
            steps: Number S of steps.
        """
        return self.step_decay ** torch.arange(steps, device=self.device)

    def step_counts(self, supervised: Tensor) -> Tensor:
        """Return what each step's sum of losses is divided by, over all processes and the optimizer step, [S].

        Args:
            supervised: Which positions count, bool [S, N], on the CPU.
        """
        return self.denominator.counts(supervised, self.device)

    def on_train_start(self) -> None:
        """Keep DDP from broadcasting the draft's buffers before every step: they never change."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.broadcast_buffers = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Run one batch and return the loss, with which Lightning updates the draft."""
        host = HostMasks.of(batch)
        self.denominator.window = self.alignment(host.window).supervised.flatten(1) if host.window else None
        features, self._next_features = self._next_features or self.features(batch), None
        outcome = self.draft_steps(batch, features)
        self.denominator.window = None  # a validation batch is divided by its own count
        if host.window and not torch.equal(outcome.supervised.cpu(), self.alignment(host.masks).supervised.flatten(1)):
            raise SpecforgeError(
                f"{type(self).__name__} counts other positions than its alignment(batch), by which trainer."
                "accumulate_grad_batches divides; override alignment in the plugin"
            )
        loss, means = self._figures.add(outcome, more_follow=is_accumulating(self.trainer))
        self._unchecked = begin_read(loss), features
        self._latest = loss, means, self.trainer.optimizers[0].param_groups[0]["lr"]
        # Lightning divides by this, as if each batch had its own mean; our weights are those of the whole step.
        return outcome.loss * self.trainer.accumulate_grad_batches

    def on_after_backward(self) -> None:
        """Check that the loss is finite, before it reaches the weights.

        A GPU has computed it when the backward pass has been launched, so that this does not interrupt it.
        """
        (read_loss, features), self._unchecked = self._unchecked, None
        loss = float(read_loss())
        if not math.isfinite(loss):
            self.teacher.check(features)
            raise SpecforgeError(
                f"the training loss is {loss} at step {self.trainer.global_step}, before it reached the weights. Try a "
                "lower model.optimizer.lr, a longer warmup or trainer.gradient_clip_val"
            )

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the figures of the optimizer step at the trainer's interval, and show some in the progress bar."""
        if is_accumulating(self.trainer):
            return
        loss, means, rate = self._latest
        self._bar.show(self.trainer, {"loss": loss, "accept": means["acceptance"][0]})
        if logs_now(self.trainer):
            # On the CPU, since Lightning reads them one by one.
            first, *others = torch.cat([loss[None], *means.values()]).cpu()
            names = (f"train/{name}/step_{step}" for name, one in means.items() for step in range(len(one)))
            self.log_dict({"train/loss": first, **dict(zip(names, others, strict=True))})
            self.log("train/learning_rate", torch.tensor(rate))

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, DraftSteps]:
        """Add a batch to the validation metrics; callbacks get the draft's results as ``draft_steps``."""
        return {"draft_steps": self._measure(batch)}

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_means("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_means("test")

    def on_train_epoch_end(self) -> None:
        """Let the next epoch read the states that were recorded in this one."""
        if (recorder := self.teacher.recorder) is not None:
            recorder.flush()
            self.trainer.strategy.barrier()  # the next epoch may read rows that other ranks recorded
            recorder.reopen()
            if self.trainer.is_global_zero:
                recorder.publish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the draft's and verifier's identity and the optimizer's name; flush recorded states, too."""
        if self.teacher.recorder is not None:
            self.teacher.recorder.flush()
        checkpoint["identity"] = Identity.of(self.draft).stored()
        checkpoint["draft_config"] = self.draft.stored_config()
        checkpoint["optimizer_name"] = self.optimizer_settings.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another draft or, in training, of other trainable weights or another optimizer.

        Without a trainer there is no draft yet; it is built from the checkpoint.

        Raises:
            UsageError: Names the differences.
        """
        if not has_trainer(self):
            self.draft = draft_in(checkpoint)
            checkpoint["state_dict"] = {f"draft.{name}": one for name, one in self.draft.state_dict().items()}
            return
        refuse_another_draft(checkpoint, str(self.trainer.ckpt_path), self.draft, self.trainer.training)
        name = checkpoint.get("optimizer_name")
        if self.trainer.training and name != self.optimizer_settings.name:
            raise UsageError(
                f"{self.trainer.ckpt_path} was trained with the optimizer {name!r}, but model.optimizer.name is "
                f"{self.optimizer_settings.name!r}; resume with the same one"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Create the optimizer and the schedule of the run."""
        optimizer = build_optimizer(self.draft, self.optimizer_settings)
        schedule = self.build_schedule(optimizer, self.length.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def build_schedule(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Create the schedule of a run of ``total_steps`` optimizer steps; override it for an algorithm's own."""
        return build_schedule(optimizer, self.schedule_settings, total_steps)

    @cached_property
    def length(self) -> RunLength:
        """Number of optimizer steps of the run; available once the data are set up."""
        return RunLength.of(self.trainer)

    def _measure(self, batch: Batch) -> DraftSteps:
        features = self.features(batch)
        outcome = self.draft_steps(batch, features)
        if not torch.isfinite(outcome.loss):
            self.teacher.check(features)
        self.means[self._stage].update(outcome, batch["input_ids"].shape)
        return outcome

    def _log_means(self, stage: str) -> None:
        metrics = self.means[stage]
        means, replayed = metrics.by_step.compute(), metrics.replayed()
        metrics.reset()
        if not means:
            raise UsageError(f"nothing in the {stage} data can be drafted: every response is a single token")
        loss = sum(
            weight * share * means[f"{name}/step_{step}"]
            for name, weight in self.term_weights.items()
            for step, share in enumerate(self.mean_weights)  # later steps are measured, but not trained
            if f"{name}/step_{step}" in means
        )
        self.log(f"{stage}/loss", torch.as_tensor(loss), prog_bar=True)
        tau = f"acceptance_length{metrics.suffix}"
        self.log(f"{stage}/{tau}", replayed.pop(tau), prog_bar=True)
        self.log_dict({f"{stage}/{name}": value for name, value in {**means, **replayed}.items()})
