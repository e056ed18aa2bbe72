"""What every sequence mixer is, and the base of those that only look backwards."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..config import Site
from ..layout import Layout
from ..state import State
from ..wrappers.scan import permute, restore, within_blocks


class Mixer(nn.Module, ABC):
    """Projections and one kernel, between (b, t, d) and (b, t, d).

    What a mixer can do it declares, and the laws test it because it is declared; asking for anything else raises
    UnsupportedCall.

    Attributes:
        causal: serves `Layout(causal=True)`.
        bidirectional: serves `Layout(causal=False)`.
        blockwise: serves `Layout(causal="block")`. Blocks of one token, which are causal, serves every causal mixer.
        packed: serves `cu_seqlens`.
        streaming: goes on from a state.
        constant_state: the state's size does not depend on how much was read.
    """

    causal: bool = True
    bidirectional: bool = False
    blockwise: bool = False
    packed: bool = True
    streaming: bool = True
    constant_state: bool = True

    def forward(
        self, x: Float[Tensor, "b t d"], layout: Layout, state: State | None = None
    ) -> tuple[Float[Tensor, "b t d"], State | None]:
        """Mix the tokens; with a state, go on where the call that returned it stopped.

        Returns:
            The mixed tokens, and where `layout.causal` the state after the last one.

        Raises:
            UnsupportedCall: the layout asks for something that this mixer does not declare.
            UnsupportedShape: `x` does not fit the layout, or the state does not fit the batch.
        """
        self._check(x, layout, state)
        if layout.block == 1 and self.causal:
            layout = Layout(cu_seqlens=layout.cu_seqlens, grid=layout.grid, extra=layout.extra)
        return self.mix(x, layout, state)

    @abstractmethod
    def mix(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        """`forward`, after the checks."""

    @abstractmethod
    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token: `forward` from it equals `forward` from None."""

    def residual_outputs(self) -> list[nn.Linear]:
        """The layers that write into the residual stream; they start smaller in deep stacks."""
        return [layer for name, layer in self.named_modules() if name.endswith("out_proj")]

    def _check(self, x: Tensor, layout: Layout, state: State | None) -> None:
        name = type(self).__name__
        layout.check(x)
        if x.shape[1] < 1:
            raise UnsupportedShape(f"{name}: x has no tokens, {tuple(x.shape)}")
        if layout.causal == "block":
            if not self.blockwise and not (self.causal and layout.block == 1):
                raise UnsupportedCall(
                    f"{name} does not look both ways within a block, and cannot serve Layout(causal='block', "
                    f"block={layout.block}); configure scan='both' for mixers that scan, and use 'attention', 'window' "
                    "or 'linear' in place of others"
                )
        elif layout.causal and not self.causal:
            raise UnsupportedCall(
                f"{name} runs in several directions and does not serve Layout(causal=True); configure scan='forward'"
            )
        if not layout.causal and not self.bidirectional:
            raise UnsupportedCall(
                f"{name} only looks backwards and does not serve Layout(causal=False); "
                "configure scan='both' or another set of orders"
            )
        if layout.cu_seqlens is not None and not self.packed:
            raise UnsupportedCall(f"{name} does not serve packed sequences (cu_seqlens)")
        if state is None:
            return
        if not self.streaming or not layout.causal:
            raise UnsupportedCall(
                f"{name} goes on from a state only where it streams, under Layout(causal=True) or 'block'"
            )
        wanted, found = layout.sequences(x.shape[0]), state.tensors()[0].shape[0]
        if wanted != found:
            raise UnsupportedShape(f"{name}: state holds {found} sequences, and the batch has {wanted}")


class ScanMixer(Mixer):
    """A mixer whose kernel only looks backwards, run in one direction or in several.

    As in Vim, VMamba and ViG the directions share the projections in and out and own the rest (gates, convolution,
    decay): `project` and `finish` are shared, `branches` holds one module for each order of the scan. Outputs of the
    directions are averaged, each back in the sequence's order.

    Forwards and backwards, it also serves blocks: the backward direction then runs within each block, and the forward
    one over all of them, so that the state is that of the forward direction alone.
    """

    def __init__(self, site: Site):
        super().__init__()
        self.scan = site.scan
        self.causal = site.scan == ("forward",)
        self.bidirectional = not self.causal
        self.blockwise = site.scan == ("forward", "backward")
        self.branches: nn.ModuleList

    @abstractmethod
    def project(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What each branch is given, permuted to its order, all (b, t, ...); and what only `finish` needs."""

    @abstractmethod
    def finish(self, mixed: Tensor, kept: Tensor | None) -> Tensor:
        """The output from the branches' mean, (b, t, ...)."""

    def mix(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        streams, kept = self.project(x)
        if self.causal:
            mixed, state = self.branches[0](streams, layout, state)
            return self.finish(mixed, kept), state
        if layout.causal == "block":
            ahead, behind = self.branches
            mixed, state = ahead(streams, Layout(cu_seqlens=layout.cu_seqlens), state)
            return self.finish((mixed + within_blocks(behind, streams, layout)) / 2, kept), state
        total = None
        for order, branch in zip(self.scan, self.branches, strict=True):
            mixed, _ = branch(tuple(permute(s, order, layout) for s in streams), layout, None)
            mixed = restore(mixed, order, layout)
            total = mixed if total is None else total + mixed
        return self.finish(total / len(self.scan), kept), None


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
