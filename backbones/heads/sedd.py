"""Score entropy over the absorbing graph (SEDD, arXiv 2310.16834)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from .masked import Masked, MaskedConfig
from .objective import register_objective

if TYPE_CHECKING:
    from ..language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SeddConfig(MaskedConfig):
    """Options of `sedd`: those of `masked`."""


@register_objective(
    "sedd",
    SeddConfig,
    summary="ratios of probabilities by score entropy, absorbing graph",
    source="arXiv 2310.16834",
    examples=(SeddConfig(),),
)
class Sedd(Masked):
    """The denoising score entropy of the absorbing graph (SEDD, equation 10), a bound on −log p.

    With masking probability t (log-linear noise) the ratio p_t(y at i) / p_t(mask at i) is (1 − t)/t times
    p(y | tokens not masked), and only this factor depends on t (arXiv 2406.03736, theorem 1). The model's score is
    therefore s_y = (1 − t)/t · e^{z_y}/v, from its logits z over v tokens, and it is not told t; the 1/v lets untrained
    scores have the right size. The loss of a masked token x is then (1/t) [n − z_x + log v − 1] with the normaliser
    n = Σ_y e^{z_y}/v: the cross-entropy of `masked` plus n − log n − 1, which is 0 where the scores are normalised.
    """

    def token_nats(
        self, model: LanguageModel, y: Float[Tensor, "n d"], targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        plain = model.cross_entropy(y, targets, reduction="none")
        # log n from the cross-entropy, which knows the normaliser, and the target's logit, a product of two rows.
        logit = model.logits_of(y, targets).to(plain.dtype)
        normaliser = plain + logit - log(self.vocab_size)
        return plain + normaliser.exp() - normaliser - 1

    def haste(self, logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        """Tweedie τ-leaping (SEDD, equation 19): from t to s, y appears with probability (t − s)/t · e^{z_y}/v."""
        return logits.logsumexp(-1).sub(log(self.vocab_size)).exp()
