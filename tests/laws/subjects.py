"""What the laws of mixers run on: every registered mixer in every one of its example configurations, and hybrids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from omnimix.backbones import Backbone, BackboneConfig, Layout, State, list_mixers
from omnimix.backbones.config import Site
from omnimix.backbones.mixers import get_mixer
from omnimix.backbones.wrappers.scan import SCANS

DIM = 32
CAUSAL = Layout(causal=True)
BOTH = Layout(causal=False, grid=(1, 3, 3), extra=(4,))


@dataclass(frozen=True)
class Subject:
    """Something that mixes: a mixer or a backbone, with random parameters and one calling convention."""

    name: str
    build: Callable[[], nn.Module]
    mixers: tuple[str, ...]

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(1)
        module = self.build()
        with torch.no_grad():
            for p in module.parameters():
                # Published initial values hide mistakes: ones, zeros and tiny weights give no gradient to compare.
                noise = torch.randn_like(p)
                p.copy_(noise * p.shape[1] ** -0.5 if p.ndim > 1 else p + 0.3 * noise)
        return module.to(dtype)


def _mixer(name: str, config, scan: str) -> Callable[[], nn.Module]:
    return lambda: get_mixer(name).build(DIM, config, Site(scan=SCANS[scan]))


def _hybrid(pattern: tuple[str, ...], scan: str) -> Callable[[], nn.Module]:
    mixers = {name: get_mixer(name).examples[0] for entry in pattern for name in entry.split("+")}
    config = BackboneConfig(dim=DIM, depth=len(pattern), pattern=pattern, mixers=mixers, scan=scan)
    return lambda: Backbone(config)


HYBRIDS = (("gla", "gla", "attention"), ("attention+gla",))


def subjects(scan: str = "forward") -> list[Subject]:
    """Every mixer in every example configuration, and the hybrids, scanning as named."""
    alone = [
        Subject(f"{name}-{i}", _mixer(name, config, scan), (name,))
        for name in list_mixers()
        for i, config in enumerate(get_mixer(name).examples)
    ]
    return alone + [Subject(",".join(pattern), _hybrid(pattern, scan), pattern) for pattern in HYBRIDS]


def capability(module: nn.Module, name: str) -> bool:
    """What a mixer declares; a backbone can do what all its mixers can."""
    mixers = [block.mixer for block in module.blocks] if isinstance(module, Backbone) else [module]
    return all(getattr(m, name) for m in mixers)


def leaves(state: State | tuple[State, ...] | None) -> list[Tensor]:
    """The tensors of a state, or of one a block."""
    if state is None:
        return []
    return [t for s in (state if isinstance(state, tuple) else (state,)) for t in s.tensors()]


def with_leaves(state: State | tuple[State, ...], tensors: list[Tensor]) -> State | tuple[State, ...]:
    """The same state holding other floating-point tensors."""
    source = iter(tensors)

    def replace(s: State) -> State:
        return s.map(lambda t: next(source) if t.is_floating_point() else t)

    return tuple(map(replace, state)) if isinstance(state, tuple) else replace(state)


def floating(state: State | tuple[State, ...] | None) -> list[Tensor]:
    return [t for t in leaves(state) if t.is_floating_point()]


def arguments(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Everything that a call depends on, for `omnimix.cli.check_kernels.results`."""
    return {"x": x} | dict(module.named_parameters())


def call(module: nn.Module, layout: Layout, *, keep: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    """`module` as a function of `arguments`, giving the output and, where kept, the state's tensors."""

    def function(*, x: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = functional_call(module, parameters, (x, layout))
        return (y, *floating(state)) if keep else (y,)

    return function


def tokens(batch: int, time: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


causal_subjects = pytest.mark.parametrize("subject", subjects(), ids=lambda s: s.name)
both_way_subjects = pytest.mark.parametrize("subject", subjects("both"), ids=lambda s: s.name)
