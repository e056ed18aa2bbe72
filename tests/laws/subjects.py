"""What the laws of mixers run on: every registered mixer in every one of its example configurations, and hybrids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from omnimix.backbones import Backbone, BackboneConfig, Context, Layout, SequenceLayer, State, list_mixers
from omnimix.backbones.config import MixerConfig, Site
from omnimix.backbones.mixers import get_mixer
from omnimix.backbones.scan import SCANS

DIM = 48
DEPTH = 3
CAUSAL = Layout(causal=True)
BOTH = Layout(causal=False, grid=(1, 3, 3), extra=(4,))


class Alone(nn.Module):
    """A layer by itself, which counts the tokens that it has read as a backbone does, and gives (y, state)."""

    def __init__(self, inner: SequenceLayer):
        super().__init__()
        self.inner = inner

    def forward(
        self, x: Tensor, layout: Layout, state: State | None = None, **given: object
    ) -> tuple[Tensor, State | None]:
        if isinstance(self.inner, Backbone):
            out = self.inner(x, Context(layout, **given), state)
            return out.y, out.state
        read = None if state is None else state["read"]
        fits = read is None or len(read) == layout.sequences(len(x))
        positions = layout.positions(x, read) if fits else None
        out = self.inner(
            x, Context(layout, positions=positions, **given), None if state is None else state.get("inner")
        )
        if not layout.causal:
            return out.y, out.state
        lengths = layout.lengths(x)
        inner = {} if out.state is None else {"inner": out.state}
        return out.y, State({"read": lengths if read is None else read + lengths, **inner})

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        state = self.inner.init_state(batch, device=device, dtype=dtype)
        if isinstance(self.inner, Backbone):
            return state
        read = torch.zeros(batch, device=device, dtype=torch.int64)
        return State({"read": read, **({} if state is None else {"inner": state})})


@dataclass(frozen=True)
class Subject:
    """Something that mixes: a layer or a backbone, with random parameters and one calling convention.

    Args:
        name: for messages and `-k`.
        build: the layer, as published.
        mixer: the registered name, where the layer is a mixer.
        config: its configuration.
    """

    name: str
    build: Callable[[], SequenceLayer]
    mixer: str | None = None
    config: MixerConfig | None = None

    def module(self, dtype: torch.dtype = torch.float64) -> Alone:
        torch.manual_seed(1)
        module = Alone(self.build())
        with torch.no_grad():
            for p in module.parameters():
                # Published initial values hide mistakes: ones, zeros and tiny weights give no gradient to compare.
                noise = torch.randn_like(p)
                p.copy_(noise * p.shape[1] ** -0.5 if p.ndim > 1 else p + 0.3 * noise)
        return module.to(dtype)


def _mixer(name: str, config, scan: str, layer: int) -> Callable[[], SequenceLayer]:
    site = Site(layer=layer, depth=DEPTH, scan=SCANS[scan])
    return lambda: get_mixer(name).build(DIM, config, site)


def _hybrid(pattern: tuple[str, ...], scan: str) -> Callable[[], SequenceLayer]:
    mixers = {name: get_mixer(name).examples[0] for entry in pattern for name in entry.split("+")}
    config = BackboneConfig(dim=DIM, depth=len(pattern), pattern=pattern, mixers=mixers, scan=scan)
    return lambda: Backbone(config)


HYBRIDS = (("gla", "gla", "attention"), ("attention+gla",))


def mixer_subjects(scan: str = "forward", layers: tuple[int, ...] = (0, DEPTH - 1)) -> list[Subject]:
    """Every mixer in every example configuration, in each of these layers of `DEPTH`."""
    return [
        Subject(f"{name}-{i}-layer-{layer}", _mixer(name, config, scan, layer), name, config)
        for name in list_mixers()
        for i, config in enumerate(get_mixer(name).examples)
        for layer in layers
    ]


def subjects(scan: str = "forward") -> list[Subject]:
    """Every mixer in every example configuration, in the first or the last layer by turns, and the hybrids."""
    alone = [
        Subject(f"{name}-{i}", _mixer(name, config, scan, layer=i % 2 * (DEPTH - 1)), name, config)
        for name in list_mixers()
        for i, config in enumerate(get_mixer(name).examples)
    ]
    return alone + [Subject(",".join(pattern), _hybrid(pattern, scan)) for pattern in HYBRIDS]


def capability(module: nn.Module, name: str) -> object:
    """What a layer declares."""
    return getattr((module.inner if isinstance(module, Alone) else module).capabilities, name)


def leaves(state: State | None) -> list[Tensor]:
    """The tensors of a state."""
    return [] if state is None else state.tensors()


def with_leaves(state: State, tensors: list[Tensor]) -> State:
    """The same state holding other floating-point tensors."""
    source = iter(tensors)
    return state.map(lambda t: next(source) if t.is_floating_point() else t)


def floating(state: State | None) -> list[Tensor]:
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


def parametrised(chosen: list[Subject]) -> pytest.MarkDecorator:
    """A test of each; `make test-fast` has the first example of every mixer."""
    marked = [pytest.param(s, marks=[] if s.name == f"{s.mixer}-0" else pytest.mark.slow) for s in chosen]
    return pytest.mark.parametrize("subject", marked, ids=lambda s: s.name)


causal_subjects = parametrised(subjects())
both_way_subjects = parametrised(subjects("bidirectional"))
