"""The optimiser of every recipe, and how its learning rate moves over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ...backbones import Backbone
from ...backbones.ffn import rebalance
from ...backbones.parameters import no_weight_decay
from ...errors import ConfigError
from .optimiser_states import match_by_name
from .training import TrainingConfig


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of hidden layers and AdamW for all else, as one optimiser with one state.

    Muon's steps are orthogonalised and have the size of AdamW's (0.2 · sqrt(max(rows, columns)), arXiv 2502.16982,
    equation 4), so that one learning rate and one weight decay serve both.

    Args:
        muon: groups of matrices, as (name, parameter) pairs.
        adamw: groups of any parameters, as pairs too.
        lr: of all groups.
        betas: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self,
        muon: list[dict[str, Any]],
        adamw: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        momentum: float,
    ):
        self._parts: list[torch.optim.Optimizer] = []
        if muon:
            self._parts.append(torch.optim.Muon(muon, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if adamw:
            self._parts.append(torch.optim.AdamW(adamw, lr=lr, betas=betas, foreach=True))
        self._sizes = [len(part.param_groups) for part in self._parts]
        groups = [group for part in self._parts for group in part.param_groups]
        # The parts have taken the names away from the parameters; torch wants them as they are given.
        groups = [g | {"params": [*zip(g["param_names"], g["params"], strict=True)]} for g in groups]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            # Loading a state puts new groups and a new state here; the parts work on what is here now.
            part.param_groups, part.state = self.param_groups[start : start + size], self.state
            part.step()
            start += size
        return loss


def parameter_groups(
    module: nn.Module,
    config: TrainingConfig,
    only: Callable[[str], bool] = lambda name: True,
) -> list[dict[str, Any]]:
    """The trainable parameters, with their names, in groups: those that decay, and those that must not.

    With `config.layer_decay` there are two groups for each layer, whose learning rates differ.
    """
    spared = no_weight_decay(module)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and only(name)]
    layers = {name: 0 if config.layer_decay == 1 else layers_above(module, name) for name, _ in named}
    groups = [
        {
            "params": [(name, p) for name, p in named if (name in spared) == free and layers[name] == layer],
            "weight_decay": 0.0 if free else config.weight_decay,
            "lr": config.lr * config.layer_decay**layer,
            "name": ("no_decay" if free else "decay") + (f"/{layer}" if layer else ""),
        }
        for layer in sorted(set(layers.values()))
        for free in (False, True)
    ]
    return [group for group in groups if group["params"]]


def layers_above(module: nn.Module, name: str) -> int:
    """How many blocks, and the layers after them, follow a parameter; what comes before the first block follows none.

    The head and the last norm have nothing above them, block i of n has n - i, and the tokenizer n + 1.
    """
    depth = max((len(part.blocks) for part in module.modules() if isinstance(part, Backbone)), default=0)
    if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name)) is not None:
        return depth - int(found[1])
    return depth + 1 if re.search(r"(?:^|\.)(tokenizer|embedding)\.", name) else 0


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the weights that Muon serves: of linear layers inside a backbone, unless they declare no decay.

    Embeddings, output matrices, convolutions, stacked experts and what else a mixer owns are AdamW's.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    found = {
        names[id(layer.weight)]
        for backbone in module.modules()
        if isinstance(backbone, Backbone)
        for layer in backbone.modules()
        if isinstance(layer, nn.Linear)
    }
    return found - no_weight_decay(module)


def build_optimiser(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration names, over the trainable parameters of `module`.

    Its state has the names of the parameters, and is loaded by them.
    """
    if config.optimizer == "adamw":
        groups = parameter_groups(module, config)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, foreach=True)
    else:
        matrices = hidden_matrices(module)
        optimizer = MuonAdamW(
            parameter_groups(module, config, matrices.__contains__),
            parameter_groups(module, config, lambda name: name not in matrices),
            lr=config.lr,
            betas=config.betas,
            momentum=config.momentum,
        )
    optimizer.register_load_state_dict_pre_hook(match_by_name)
    return optimizer


def cosine(step: int, total: int, warmup: float, floor: float) -> float:
    """The factor on the learning rate at `step` of `total`: a linear rise, then half a cosine down to `floor`."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))


def wsd(step: int, total: int, warmup: float, floor: float, decay: float) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395, section 4): the peak is held, and falls over the last part `decay`.

    The fall has the shape 1 − sqrt (arXiv 2405.18392, equation 1). Until it begins nothing depends on `total` but the
    warm-up, so that one long run can be ended at several lengths.
    """
    rise, fall = round(warmup * total), round(decay * total)
    if step < rise:
        return (step + 1) / rise
    if step <= total - fall:
        return 1.0
    return floor + (1 - floor) * (1 - math.sqrt(min(1.0, (step - total + fall) / fall)))


_ENDLESS = "trainer.max_epochs is -1; the learning rate's schedule needs an end (or trainer.max_steps)"


def planned_steps(trainer: Any) -> int:
    """The optimiser's steps in the whole run.

    `trainer.estimated_stepping_batches` would build the loop's loader before its state is restored, and Lightning
    then leaves the state out: a run resumed within an epoch would begin the epoch anew.

    Raises:
        ConfigError: a run without an end, for which there is no schedule.
    """
    if trainer.datamodule is None:
        # Loaders that are passed on their own have no state to restore.
        most = trainer.estimated_stepping_batches
        if most == math.inf:
            raise ConfigError(_ENDLESS)
        return int(most)
    most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        most = min(most, math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    if most == math.inf:
        raise ConfigError(_ENDLESS)
    return int(most)


def optimise(module: pl.LightningModule, config: TrainingConfig) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimiser, and a schedule with warm-up that moves every step."""
    total = planned_steps(module.trainer)
    optimizer = build_optimiser(module, config)
    optimizer.register_step_post_hook(lambda *_: rebalance(module))

    def factor(step: int) -> float:
        if config.schedule == "cosine":
            return cosine(step, total, config.warmup, config.min_lr)
        return wsd(step, total, config.warmup, config.min_lr, config.decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}
