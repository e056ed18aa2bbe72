"""What every sequence mixer is, and the base of those with causal kernels."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..config import Site
from ..context import Context
from ..layer import NOTHING, Capabilities, Output, SequenceLayer
from ..layout import Layout
from ..scan import permute, restore, within_blocks
from ..state import State


class Mixer(SequenceLayer):
    """Projections and one kernel, between (b, t, d) and (b, t, d).

    What a mixer can do it declares as `capabilities`, and the laws test it because it is declared; asking for anything
    else raises UnsupportedCall.
    """

    capabilities = Capabilities(bidirectional=False, blockwise=False)

    def forward(self, x: Float[Tensor, "b t d"], context: Context | Layout, state: State | None = None) -> Output:
        """Mix the tokens; with a state, resume after the call that returned it.

        Returns:
            The mixed tokens, and where the layout is causal the state after the last one.

        Raises:
            UnsupportedCall: the layout asks for something that this mixer does not declare.
            UnsupportedShape: `x` does not fit the layout, or the state does not fit the batch.
        """
        context = Context.of(context)
        self.check(x, context, state)
        layout = context.layout
        if x.shape[1] == 0:
            fresh = layout.causal and state is None
            batch = layout.sequences(x.shape[0])
            return Output(x, self.init_state(batch, device=x.device, dtype=x.dtype) if fresh else state)
        if isinstance(layout.block, int) and layout.block == 1 and self.capabilities.causal:
            context = context.replace(layout=layout.replace(causal=True, block=None))
        return self.mix(x, context, state)

    @abstractmethod
    def mix(self, x: Tensor, context: Context, state: State | None) -> Output:
        """`forward`, after the checks, of at least one token."""

    def check(self, x: Tensor, context: Context, state: State | None) -> None:
        """Raise where `forward` cannot serve its arguments."""
        name, can, layout = type(self).__name__, self.capabilities, context.layout
        layout.check(x)
        if layout.causal == "block":
            ones = isinstance(layout.block, int) and layout.block == 1
            if not can.blockwise and not (can.causal and ones):
                raise UnsupportedCall(
                    f"{name} is not bidirectional within a block, and cannot serve Layout(causal='block', "
                    f"block={layout.block}); configure scan='bidirectional' for mixers that scan, and use 'attention', "
                    "'window' or 'linear' in place of others"
                )
        elif layout.causal and not can.causal:
            raise UnsupportedCall(
                f"{name} runs a multi-directional scan and does not serve Layout(causal=True); configure scan='forward'"
            )
        elif not layout.causal and not can.bidirectional:
            raise UnsupportedCall(
                f"{name} is causal and does not serve Layout(causal=False); configure scan='bidirectional' or another "
                "set of orders"
            )
        if layout.cu_seqlens is not None and not can.packed:
            raise UnsupportedCall(f"{name} does not serve packed sequences (cu_seqlens)")
        if state is not None:
            self._check_state(x, context, state)

    def _check_state(self, x: Tensor, context: Context, state: State) -> None:
        name, layout = type(self).__name__, context.layout
        if not self.capabilities.streaming or not layout.causal:
            raise UnsupportedCall(
                f"{name} resumes from a state only where it streams, under Layout(causal=True) or 'block'"
            )
        wanted = layout.sequences(x.shape[0])
        for tensor in state.tensors()[:1]:
            if tensor.shape[0] != wanted:
                raise UnsupportedShape(f"{name}: state holds {tensor.shape[0]} sequences, and the batch has {wanted}")
        if "positions" in self.capabilities.reads and context.positions is None:
            raise UnsupportedCall(
                f"{name} was given a state without context.positions; a Backbone counts the tokens read, and whoever "
                "calls a mixer alone passes Context(layout, positions=...)"
            )


class ScanMixer(Mixer):
    """A mixer with a causal kernel, run in one direction or in several.

    As in Vim, VMamba and ViG the directions share the projections in and out and own the rest (gates, convolution,
    decay): `project` and `finish` are shared, `branches` holds one module for each order of the scan. Outputs of the
    directions are averaged, each back in the sequence's order.

    Forward and backward, it also serves blocks: the backward direction then runs within each block, and the forward
    one over all of them, so that the state is that of the forward direction alone.

    One order other than "forward" also serves layouts that are not causal, where a token sees what its order visits
    before it.

    A branch is called as `(streams, context, state)` and returns `(mixed, state)`; its context is that of the order in
    which it runs. Where mixed is a tuple, all but its first tensor go to `publish`, back in the sequence's order.
    """

    scans = True

    def __init__(self, site: Site):
        super().__init__()
        self.scan = site.scan
        causal = site.scan == ("forward",)
        self.capabilities = dataclasses.replace(
            type(self).capabilities,
            causal=causal,
            bidirectional=not causal,
            blockwise=site.scan == ("forward", "backward"),
            streaming=causal or site.scan == ("forward", "backward"),
            needs_grid=any(order not in ("forward", "backward") for order in site.scan),
        )
        self.branches: nn.ModuleList

    @abstractmethod
    def project(self, x: Tensor, context: Context) -> tuple[tuple[Tensor, ...], Any]:
        """What each branch is given, permuted to its order, all (b, t, ...); and what only `finish` needs."""

    @abstractmethod
    def finish(self, mixed: Tensor, kept: Any) -> Tensor:
        """The output from the branches' mean, (b, t, ...)."""

    def publish(self, more: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """What is shared with later layers, from what each branch returned in addition to its output."""
        return {}

    def mix(self, x: Tensor, context: Context, state: State | None) -> Output:
        streams, kept = self.project(x, context)
        layout = context.layout
        if layout.causal is True:
            (mixed, *more), state = _several(self.branches[0](streams, context, state))
            return Output(self.finish(mixed, kept), state, shared=self.publish([tuple(more)]) if more else NOTHING)
        found: list[tuple[Tensor, ...]] = []
        if layout.causal == "block":
            forward, backward = self.branches
            inner = context.replace(layout=Layout(cu_seqlens=layout.cu_seqlens))
            mixed, state = _several(forward(streams, inner, state))
            found = [mixed, within_blocks(lambda *given: _several(backward(*given)), streams, layout)]
        else:
            inner = Context(Layout(causal=False, cu_seqlens=layout.cu_seqlens))
            for order, branch in zip(self.scan, self.branches, strict=True):
                mixed, _ = _several(branch(tuple(permute(s, order, layout) for s in streams), inner, None))
                found.append(tuple(restore(part, order, layout) for part in mixed))
            state = None
        total = found[0][0]
        for mixed, *_ in found[1:]:
            total = total + mixed
        shared = self.publish([tuple(more) for _, *more in found]) if len(found[0]) > 1 else NOTHING
        return Output(self.finish(total / len(found), kept), state, shared=shared)


def _several(result: tuple[Tensor | tuple[Tensor, ...], State | None]) -> tuple[tuple[Tensor, ...], State | None]:
    """A branch's result with its first part as a tuple."""
    mixed, state = result
    return mixed if isinstance(mixed, tuple) else (mixed,), state


def heads_for(dim: int, heads: int | None, size: int = 64) -> int:
    """`heads`, or as many heads of about `size` channels as divide `dim`.

    Raises:
        ConfigError: `heads` does not divide `dim`.
    """
    if heads is None:
        return next(n for n in range(max(1, dim // size), 0, -1) if dim % n == 0)
    if dim % heads:
        raise ConfigError(f"heads is {heads}; it must divide the width {dim}")
    return heads
