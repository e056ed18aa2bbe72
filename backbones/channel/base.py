"""What every channel layer is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from ..registry import Registry


class Channel(nn.Module, ABC):
    """Mixes the channels of each token."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b t d"], dict[str, Tensor]]:
        """The mixed tokens, and losses by name (of routed experts; empty otherwise)."""

    def residual_outputs(self) -> list[nn.Module]:
        """The layers that write into the residual stream; they start smaller in deep stacks."""
        return [layer for name, layer in self.named_modules() if name.endswith("out_proj")]


CHANNELS: Registry[Channel] = Registry("channel layer", options="channels")
register_channel = CHANNELS.register
