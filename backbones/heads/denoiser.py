"""What all objectives share that replace tokens by a mask and predict them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import UnsupportedCall
from ..config import ObjectiveConfig
from ..layer import Capabilities, unfit
from .objective import Objective

if TYPE_CHECKING:
    from ..language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(ObjectiveConfig):
    """Options of every denoiser.

    Args:
        shift: a token is predicted at the place before it, as in the autoregressive model that the weights come from
            (DiffuLLaMA, arXiv 2410.17891, section 3.2; Dream, arXiv 2508.15487).
    """

    shift: bool = False


class Denoiser(Objective):
    """Predicts masked tokens from those that are not; the mask itself is never predicted.

    Attributes:
        shift: whether a token is predicted at the place before it.
        block: tokens that are written at a time, those before them being final; None where all are.
        view: what layers have to be, for messages.
    """

    decoder: ClassVar = "diffusion"
    extra_tokens: ClassVar[int] = 1
    shift: bool
    block: int | None = None
    view: ClassVar[str] = "bidirectional"

    def __init__(self, dim: int, vocab_size: int, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.shift = config.shift

    def serves(self, can: Capabilities) -> bool:
        """Whether a layer with these capabilities sees what this objective needs."""
        return can.bidirectional

    def check(self, model: LanguageModel) -> None:
        if name := unfit(model.backbone, self.serves):
            raise UnsupportedCall(
                f"objective {model.config.objective_name!r} needs layers that are {self.view}, and {name} is not; "
                "configure scan='bidirectional' (omnimix.convert does it for trained weights), or 'attention' in place "
                "of mixers that do not scan"
            )

    def token_nats(
        self, model: LanguageModel, y: Float[Tensor, "n d"], targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """What each masked token costs, given the backbone's output where it is predicted."""
        return model.cross_entropy(y, targets, reduction="none")

    def haste(self, logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        """By which factor each masked token is revealed sooner, or later, than its share of the time left says."""
        return torch.ones_like(logits[:, 0])
