"""``trainer.strategy: fsdp2``: shard the draft, its gradients and its optimizer state over all processes.

The draft is one group of torch's ``fully_shard``, gathered once per optimizer step: its layers run once for each draft
step, and a group for each layer would be gathered each time. Checkpoints are single files as without sharding, so any
number of processes can resume from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from specforge.private.lightning import shard_over
from specforge.private.torch import tree_map

FSDP2 = "fsdp2"

# The methods of a module that Lightning calls in a step.
STEPS = ("training_step", "validation_step", "test_step")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the trained module over all processes of a run with torch's ``fully_shard``.

    Args:
        process_group_backend: Backend of the collectives; the device's default if None.
        timeout: How long a process waits for the others in a collective.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded after sharding."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning restores the optimizers' states, as without sharding."""
        return True

    def setup_environment(self) -> None:
        """Shard over all processes, each with its own data; Lightning's default on one node does not shard."""
        shard_over(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the module before its optimizers are created."""
        self.model_to_device()
        assert self.model is not None
        # Only one process per node has prepared the data, so the random weights may differ.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            torch.distributed.broadcast(tensor.data, src=0)
        mixed = self.precision_plugin.precision == "bf16-mixed"
        computed, reduced = (torch.bfloat16, torch.float32) if mixed else (None, None)
        policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=reduced, cast_forward_inputs=False)
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        for step in STEPS:
            register_fsdp_forward_method(self.model, step)
        super().setup(trainer)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather an optimizer's unsharded state; only the first process keeps it."""
        return self._gathered(optimizer.state_dict())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the module's weights; only the first process keeps them."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; Lightning later passes its weights and states to the methods below."""
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, "cpu", mmap=True, weights_only=weights_only)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Shard the weights of a checkpoint into the module."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard the states of a checkpoint into the optimizers, each like its parameter."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            sharded = {
                number: {name: _shard_like(value, parameters[number]) for name, value in of_one.items()}
                for number, of_one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})

    def on_train_end(self) -> None:
        """Replace the shards by whole weights: the following work is not done by all processes together."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # after a validation the weights are gathered, in the compute dtype
        for module in self.model.modules():
            for name, shard in list(module.named_parameters(recurse=False)):
                whole = shard.full_tensor() if isinstance(shard, DTensor) else shard
                setattr(module, name, nn.Parameter(whole.detach(), shard.requires_grad))

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            return whole.cpu() if self.is_global_zero else None

        gathered: dict[str, Any] = tree_map(gather, state)
        return gathered


def _shard_like(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
