"""The one signature of everything that maps tokens to tokens, so that all of it nests."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .context import Context, Shared
from .layout import Layout
from .state import State

# Of outputs without losses or shared values; never changed.
NOTHING: Mapping[str, Any] = {}


class Output(NamedTuple):
    """What a layer returns.

    Args:
        y: the tokens, (b, t, d).
        state: after the last token; None where there is nothing to remember, or the layout is not causal.
        losses: scalars, weighted already, by name; the backbone adds them up.
        shared: what the layer adds for later ones, under the names that it declares to write.
        context: of the tokens in `y`, where they are not those that came in.
    """

    y: Tensor
    state: State | None = None
    losses: Mapping[str, Tensor] = NOTHING
    shared: Shared = NOTHING
    context: Context | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a layer can do. The laws in tests/laws test it because it is declared; asking for anything else raises.

    Args:
        causal: serves `Layout(causal=True)`.
        bidirectional: serves `Layout(causal=False)`.
        blockwise: serves `Layout(causal="block")`. Blocks of one token, which are causal, serves every causal layer.
        packed: serves `cu_seqlens`.
        streaming: resumes from a state.
        constant_state: the state's size does not depend on how much was read.
        rows_independent: an output depends on its own sequence only, in training too.
        needs_grid: serves layouts with a grid only.
        receptive_field: how many tokens back, its own included, an output depends on at least, and apart from sinks at
            most; None: on all that the layout lets it see.
        reads: names in `Context.shared` that it needs; "positions" stands for `Context.positions`.
        writes: names that it adds.
    """

    causal: bool = True
    bidirectional: bool = True
    blockwise: bool = True
    packed: bool = True
    streaming: bool = True
    constant_state: bool = True
    rows_independent: bool = True
    needs_grid: bool = False
    receptive_field: int | None = None
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()

    @staticmethod
    def joined(parts: Iterable[Capabilities], *, sequential: bool = True) -> Capabilities:
        """Those of a layer made of others: what all can do.

        Args:
            sequential: whether each part sees what the parts before it wrote, or all the same tokens.
        """
        parts = list(parts)
        every = ("causal", "bidirectional", "blockwise", "packed", "streaming", "constant_state", "rows_independent")
        reads: set[str] = set()
        writes: set[str] = set()
        field: int | None = 1
        for part in parts:
            reads |= part.reads - (writes if sequential else set())
            writes |= part.writes
            if field is not None and part.receptive_field is not None:
                own = part.receptive_field
                field = field + own - 1 if sequential else max(field, own)
            else:
                field = None
        return Capabilities(
            **{name: all(getattr(part, name) for part in parts) for name in every},
            needs_grid=any(part.needs_grid for part in parts),
            receptive_field=field,
            reads=frozenset(reads),
            writes=frozenset(writes),
        )


# Of a layer that treats each token by itself.
TOKENWISE = Capabilities(receptive_field=1)


class SequenceLayer(nn.Module, ABC):
    """Tokens to tokens: mixers, feed-forward layers, wrappers, transitions, blocks, backbones.

    Attributes:
        capabilities: of this instance.
        scans: whether it runs in the orders of `Site.scan`.
        per_use: names of child modules and parameters that stay a layer's own where it is tied to another.
    """

    capabilities: Capabilities = TOKENWISE
    scans: ClassVar[bool] = False
    per_use: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Float[Tensor, "b t d"], context: Context | Layout, state: State | None = None) -> Output:
        """The tokens after this layer; with a state, resumes after the call that returned it.

        Args:
            x: tokens; none (t = 0) is legal, and leaves the state as it is.
            context: what is known of them.
            state: of the call before; it is not changed, so that it may be kept and used again.
        """

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State | None:
        """The state of `batch` sequences after zero tokens: `forward` from it equals `forward` from None."""
        return None

    def residual_outputs(self) -> list[nn.Module]:
        """The layers that write into the residual stream, each with a `weight`; they start smaller in deep stacks."""
        return [layer for name, layer in self.named_modules() if name.endswith("out_proj")]

    def residual_branches(self) -> int:
        """How many mixers and feed-forward layers within it add to a residual stream."""
        return 1


def unfit(module: nn.Module, serves: Callable[[Capabilities], bool]) -> str | None:
    """The innermost layer whose capabilities do not serve, for messages: "GLA in layer 3"; None if all do."""
    first, found = None, None
    for name, part in module.named_modules():
        if isinstance(part, SequenceLayer) and not serves(part.capabilities):
            layer = re.search(r"(?:^|\.)blocks\.(\d+)", name)
            if layer is None:
                found = found or type(part).__name__
            elif first in (None, layer[1]):
                first, found = layer[1], f"{type(part).__name__} in layer {layer[1]}"
    return found
