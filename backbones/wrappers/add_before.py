"""A shared branch whose output is added to what another layer reads (Zamba2, arXiv 2411.15242)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..block import added
from ..config import INHERIT, BlockConfig, MixerConfig, Site, configured
from ..context import Context
from ..layer import Capabilities, Output, SequenceLayer
from ..norm import RMSNorm
from ..registry import build_part
from ..state import State
from .base import WrapperConfig, inner_block, register_wrapper


@dataclass(frozen=True, kw_only=True)
class AddBeforeConfig(WrapperConfig):
    """Options of `add_before`, for blocks with residual="none".

    Args:
        inner: the mixer that stays the block's own.
        branch: the block that may be tied between depths; it has nothing to inherit but its residual form, "pre".
        concat: name of the shared tensor (b, t, d) that is concatenated to what the branch reads; None for none.
    """

    inner: MixerConfig | str
    branch: BlockConfig
    concat: str | None = "input"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", configured(MixerConfig, self.inner))
        if self.branch.ffn == INHERIT:
            raise ConfigError("AddBeforeConfig.branch has no ffn; name one, or None")


@register_wrapper(
    "add_before",
    AddBeforeConfig,
    summary="a mixer that reads the tokens plus the output of a block that depths may share",
    source="arXiv 2411.15242",
    examples=(),
)
class AddBefore(SequenceLayer):
    """x + inner(norm(x + W branch([x, input]))). Tied, `branch` is shared; inner, norm and W are per use."""

    per_use = ("inner", "norm", "linear")

    def __init__(self, dim: int, config: AddBeforeConfig, site: Site):
        super().__init__()
        self.concat = config.concat
        wide = dim if config.concat is None else 2 * dim
        self.branch = inner_block(wide, config.branch, site)
        self.linear = nn.Linear(wide, dim, bias=False)
        self.norm = RMSNorm(dim, eps=site.norm_eps)
        self.inner = build_part(config.inner, dim, site)
        joined = Capabilities.joined(part.capabilities for part in (self.branch, self.inner))
        reads = joined.reads | ({config.concat} if config.concat else set())
        self.capabilities = Capabilities(**{**vars(joined), "reads": frozenset(reads)})

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Output:
        context = Context.of(context)
        before = {} if state is None else state.parts
        wide = x if self.concat is None else torch.cat([x, context.tensor(self.concat, type(self).__name__)], dim=-1)
        branch = self.branch(wide, context, before.get("branch"))
        context = context.with_shared(branch.shared)
        out = self.inner(self.norm(x + self.linear(branch.y)), context, before.get("inner"))
        states = {"branch": branch.state, "inner": out.state}
        states = {name: after for name, after in states.items() if after is not None}
        return Output(
            x + out.y,
            State(states) if states else None,
            added(branch.losses, out.losses),
            {**branch.shared, **out.shared},
        )

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> State | None:
        states = {
            name: getattr(self, name).init_state(batch, device=device, dtype=dtype) for name in ("branch", "inner")
        }
        states = {name: state for name, state in states.items() if state is not None}
        return State(states) if states else None

    def residual_outputs(self) -> list[nn.Module]:
        return [*self.branch.residual_outputs(), *self.inner.residual_outputs()]

    def residual_branches(self) -> int:
        return self.branch.residual_branches() + self.inner.residual_branches()
