"""Systems that the contract must be able to say: configurations, on which all laws run."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnimix.backbones import Backbone, BackboneConfig, Context, Layout, Memory

Grid = tuple[int, int, int]


def nothing(sequences: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class System:
    """A backbone, and what it is given.

    Args:
        config: of width 32 or less.
        given: arguments of `Context` for so many sequences, each with data of its own that does not depend on how many
            there are: `condition` and memories in `shared`.
        grids: of images that it takes; empty where it takes sequences of any length.
        layout: how sequences lie where they are not plainly causal.
        train: whether it is in training mode.
        compiles: whether torch.compile takes it whole; not where the number of tokens that a layer sees depends on
            their values.
        checks: further tests, `(system, backbone) -> None`.
    """

    config: BackboneConfig
    given: Callable[[int], dict[str, Any]] = nothing
    grids: tuple[Grid, ...] = ()
    layout: Callable[[Tensor], Layout] | None = None
    train: bool = False
    compiles: bool = True
    checks: tuple[Callable[[Backbone], None], ...] = field(default=())

    def backbone(self, dtype: torch.dtype = torch.float64) -> Backbone:
        """With random parameters: published initial values hide mistakes."""
        torch.manual_seed(1)
        net = Backbone(self.config)
        seen: set[int] = set()
        with torch.no_grad():
            for p in net.parameters():
                if id(p) not in seen:
                    noise = torch.randn_like(p)
                    p.copy_(noise * p.shape[1] ** -0.5 if p.ndim > 1 else p + 0.3 * noise)
                seen.add(id(p))
        return net.to(dtype).train(self.train)

    def context(self, x: Tensor, layout: Layout | None = None, rows: slice = slice(None)) -> Context:
        """The context of `x`; `rows`: the sequences of all that these are."""
        if layout is None and self.grids:
            layout = Layout(causal=False, grid=self.grids[0])
        elif layout is None:
            layout = Layout() if self.layout is None else self.layout(x)
        sequences = layout.sequences(len(x))
        total = sequences if rows == slice(None) else rows.stop
        given = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t[rows].to(x.dtype) if t.is_floating_point() else t[rows], self.given(total)
        )
        return Context(layout, **given)

    def tokens(self, batch: int, time: int = 9, seed: int = 0) -> Tensor:
        """Random tokens; of images as many as the first grid has cells."""
        if self.grids:
            time = torch.tensor(self.grids[0]).prod().item()
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, time, self.config.dim, generator=generator, dtype=torch.float64)


def random_memory(sequences: int, slots: int, dim: int, positions: list[int] | None = None) -> Memory:
    """Tokens "x" of each sequence, the same however many sequences there are."""
    rows = [
        torch.randn(slots, dim, generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)
        for i in range(sequences)
    ]
    places = torch.zeros(slots, dtype=torch.int64) if positions is None else torch.tensor(positions)
    return Memory({"x": torch.stack(rows)}, places.expand(sequences, -1).clone())


def systems() -> dict[str, System]:
    """Every system by the name of its module."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").SYSTEMS
    return found
