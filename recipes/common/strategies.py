"""Training with the weights in shards (FSDP2) as a strategy of Lightning's, on any device; and weights made whole."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ...backbones import Backbone
from ...backbones.serialization import current_name
from ...backbones.tie import shared_parameters
from ...errors import ConfigError
from .optimiser_states import keyed_by_name
from .private_lightning import DataParallelStrategy


class FullySharded(DataParallelStrategy):
    """`--trainer.strategy fsdp2`: each process keeps a part of weights, gradients and the optimiser's state.

    The blocks of a backbone are gathered one after the other when they are needed. Checkpoints hold whole tensors, so
    that they do not depend on the number of processes.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None and self.model is not None
        # As Lightning's, which leaves the sharding to a hook of the module; this shards what any recipe has.
        self.accelerator.setup(trainer)
        # What parameters say of themselves (`backbones.parameters`) would go with the tensors that shards replace.
        said = {name: dict(vars(p)) for name, p in self.lightning_module.named_parameters()}
        shard(self.lightning_module, self.device_mesh["data_parallel"])
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        for name, p in self.lightning_module.named_parameters():
            vars(p).update(said[name])
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def load_checkpoint(self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None) -> Any:
        """Load a checkpoint of any strategy; returns what is neither weights nor an optimiser's state.

        Lightning would look for the parameters' names of today only, and take an optimiser that ran on one process to
        have its parameters in the module's order, where they are in the order of its groups.
        """
        assert self.lightning_module is not None
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        load_whole(self.lightning_module, checkpoint.pop("state_dict"))
        if self.optimizers:
            for state, optimizer in zip(checkpoint["optimizer_states"], self.optimizers, strict=True):
                named, options = keyed_by_name(optimizer, state), StateDictOptions(full_state_dict=True)
                set_optimizer_state_dict(self.lightning_module, optimizer, named, options=options)
        return checkpoint


StrategyRegistry.register("fsdp2", FullySharded, description="weights in shards, on any device")


def shard(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Shard each block of every backbone in `module`, and what is left; what is sharded already stays.

    Raises:
        ConfigError: a parameter without dimensions, which cannot be sharded.
    """
    if sharded(module):
        return
    for name, p in module.named_parameters():
        if p.ndim == 0:
            raise ConfigError(f"trainer.strategy 'fsdp2' cannot shard the scalar {name}; use 'ddp'")
    for backbone in [part for part in module.modules() if isinstance(part, Backbone)]:
        shard_backbone(backbone, mesh, root=False)
    # Resharded after each pass: whoever looks at the parameters in between finds all of them in one form.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for step in ("training_step", "validation_step", "test_step"):
        register_fsdp_forward_method(module, step)


def shard_backbone(backbone: Backbone, mesh: DeviceMesh, *, root: bool = True) -> None:
    """Shard each block and transition of a backbone by itself, and with `root` what is left.

    What blocks share is sharded before them: a block would otherwise take it for its own.
    """
    parts = [*backbone.blocks, *backbone.transitions.values()]
    uses = Counter(id(module) for part in parts for module in part.modules())
    # Modules that have a parameter in common, and are not one module, belong into one group.
    together = {id(slot[0]): [module for module, _ in slots] for slots in shared_parameters(backbone) for slot in slots}
    # From the leaves upwards, as FSDP2 asks; the first module of a group comes last, after what all of them hold.
    for module in reversed([*backbone.modules()]):
        if (group := together.get(id(module))) is not None:
            if group[0] is module:
                fully_shard(group, mesh=mesh)
        elif uses[id(module)] > 1 and next(module.parameters(recurse=False), None) is not None:
            fully_shard(module, mesh=mesh)
    for part in parts:
        fully_shard(part, mesh=mesh)
    if root:
        fully_shard(backbone, mesh=mesh)


def sharded(module: nn.Module) -> bool:
    """Whether the weights lie in shards."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has; without history, over the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_as(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which `part` is this process' part, cut as `like` is; all processes must call it."""
    if not isinstance(like, DTensor):
        return part
    parts = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return parts.full_tensor().cpu()


def load_whole(module: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole tensors into a module, in shards or not."""
    if sharded(module):
        weights = {current_name(name): tensor for name, tensor in weights.items()}
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def whole_model(trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module | None:
    """`module.model` with whole weights on the first process, None on the others; all processes must call it."""
    own: Any = module.model
    if not sharded(module):
        return own if trainer.is_global_zero else None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(own, options=options)
    if not trainer.is_global_zero:
        return None
    with torch.random.fork_rng(devices=[]):
        model = type(own)(own.config)
    model.load_state_dict(weights)
    return model.train(own.training)
