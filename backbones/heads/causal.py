"""Next-token prediction, optionally of several tokens ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedCall, UnsupportedShape
from ...utils.renamed import renamed_options
from ..config import DEEPEST, ObjectiveConfig, not_negative, positive
from ..layer import unfit
from ..layout import Layout, offsets, pack_rows
from .objective import Likelihood, Objective, ObjectiveLoss, register_objective

if TYPE_CHECKING:
    from ..language import LanguageModel

IGNORED = -100


@renamed_options(ahead="n_future", ahead_weight="n_future_weight")
@dataclass(frozen=True, kw_only=True)
class CausalConfig(ObjectiveConfig):
    """Options of `causal`.

    Args:
        n_future: tokens that are predicted from each position; only the first of them is used to decode.
        n_future_weight: of the mean loss of the further tokens.
        z_loss: coefficient that keeps the softmax's normaliser near 1 (arXiv 2204.02311, section 5).
    """

    n_future: int = 1
    n_future_weight: float = 0.3
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "n_future", most=DEEPEST)
        not_negative(self, "n_future_weight", "z_loss")


@register_objective(
    "causal",
    CausalConfig,
    summary="each token from those before it; several ahead where wanted",
    source="arXiv 2404.19737",
    examples=(CausalConfig(), CausalConfig(n_future=3, z_loss=1e-3)),
)
class Causal(Objective):
    """−log p(token | tokens before it).

    With `n_future` > 1 each further token has its own residual layer between the backbone and the shared output matrix
    (multi-token prediction, arXiv 2404.19737; the layer is Medusa's, arXiv 2401.10774), which decoding leaves out.
    """

    def __init__(self, dim: int, vocab_size: int, config: CausalConfig):
        super().__init__()
        self.config = config
        further = [nn.Linear(dim, dim, bias=False) for _ in range(config.n_future - 1)]
        for layer in further:
            nn.init.zeros_(layer.weight)
        self.further = nn.ModuleList(further)

    def check(self, model: LanguageModel) -> None:
        if name := unfit(model.backbone, lambda can: can.causal):
            raise UnsupportedCall(
                f"objective 'causal' needs causal layers, and {name} is not: it runs a multi-directional scan or "
                "compares tokens of the whole sequence; configure scan='forward' for mixers that scan"
            )

    def loss(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> ObjectiveLoss:
        if lengths is not None:
            # What fills rows up is no token: layers that count tokens or compare them do not meet it.
            tokens, counted, cu_seqlens = packed(tokens, counted, lengths)
        targets = shifted(tokens, 1, cu_seqlens, counted)
        count = int((targets != IGNORED).sum())
        # A graph has no branch that depends on the data.
        if not torch.compiler.is_compiling() and not count:
            raise UnsupportedShape(f"tokens: of {tuple(tokens.shape)} none is left to be predicted")
        out = model.hidden(tokens, Layout(causal=True, cu_seqlens=cu_seqlens))
        plain = model.cross_entropy(out.y, targets, reduction="sum", z_loss=self.config.z_loss)
        parts = {"next": plain.detach() / count}
        loss = plain / count
        if self.config.n_future > 1:
            total = loss.new_zeros(())
            for i, layer in enumerate(self.further):
                later = shifted(tokens, i + 2, cu_seqlens, counted)
                total = total + model.cross_entropy(out.y + F.silu(layer(out.y)), later)
            parts["n_future"] = total.detach() / len(self.further)
            loss = loss + self.config.n_future_weight * total / len(self.further)
        for name, extra in out.losses.items():
            parts[name] = extra.detach()
            loss = loss + extra
        nats = plain.detach()
        if self.config.z_loss:
            with torch.no_grad():
                nats = model.cross_entropy(out.y, targets, reduction="sum")
        return ObjectiveLoss(loss=loss, nats=nats, count=count, parts=parts)

    @torch.no_grad()
    def log_likelihood(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        counted: Tensor | None = None,
        samples: int = 32,
        seed: int = 0,
    ) -> Likelihood:
        """Exact: `samples` and `seed` have no influence. The first token of a row is given."""
        cu_seqlens, sizes = None, [tokens.shape[1]] * len(tokens)
        if lengths is not None:
            sizes = lengths.tolist()
            tokens, counted, cu_seqlens = packed(tokens, counted, lengths)
        targets = shifted(tokens, 1, cu_seqlens, counted)
        y = model.hidden(tokens, Layout(causal=True, cu_seqlens=cu_seqlens)).y
        nats = model.cross_entropy(y, targets, reduction="none").double().flatten().split(sizes)
        pairs = zip(y.flatten(0, 1).split(sizes), targets.flatten().split(sizes), strict=True)
        greedy = [((model.logits(row).argmax(-1) == own) | (own == IGNORED)).all() for row, own in pairs]
        return Likelihood(nats=torch.stack([row.sum() for row in nats]).cpu(), greedy=torch.stack(greedy).cpu())


def packed(tokens: Tensor, counted: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows of these lengths, and which of their tokens are counted, one after another in one row; their boundaries."""
    return pack_rows(tokens, lengths), None if counted is None else pack_rows(counted, lengths), offsets(lengths)


def shifted(tokens: Tensor, by: int, cu_seqlens: Tensor | None, counted: Tensor | None) -> Tensor:
    """For each position the token `by` places later in its sequence, `IGNORED` where there is none or it is given."""
    targets = tokens if counted is None else tokens.masked_fill(~counted, IGNORED)
    targets = F.pad(targets[:, by:], (0, min(by, tokens.shape[1])), value=IGNORED)
    if cu_seqlens is not None:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        ends = cu_seqlens.long()[1:]
        end = ends[torch.searchsorted(ends, place, right=True)]
        targets = targets.masked_fill((place + by >= end)[None], IGNORED)
    return targets
