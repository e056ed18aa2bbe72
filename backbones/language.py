"""Language models: token ids in, logits or a loss out, around any backbone and any objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..kernels import cross_entropy
from ..utils.private_torch import untouched
from ..utils.renamed import renamed_options
from .backbone import Backbone
from .config import BackboneConfig, ObjectiveConfig, configured, positive, to_plain
from .context import Context
from .heads import ObjectiveLoss
from .heads.causal import IGNORED
from .layer import Output
from .layout import Layout
from .registry import entry_of
from .state import State
from .tie import SharingModule, share
from .typed import Config

# Of a head that must be called so many logits are held at a time.
LOGITS_AT_A_TIME = 1 << 24


@renamed_options(vocabulary="vocab_size", tie="tie_word_embeddings")
@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """A language model.

    Args:
        backbone: its `scan` is "forward" under causal objectives, and "bidirectional" under diffusion.
        vocab_size: token ids are 0 … vocab_size − 1. An objective may add tokens of its own after them (the mask).
        objective: what it is trained for: its configuration or name; see `list_objectives()`.
        tie_word_embeddings: whether the output matrix is the embedding (arXiv 1608.05859).
    """

    backbone: BackboneConfig
    vocab_size: int
    objective: ObjectiveConfig | str = "causal"
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        positive(self, "vocab_size")
        object.__setattr__(self, "objective", configured(ObjectiveConfig, self.objective))

    @property
    def objective_name(self) -> str:
        """The name of the objective."""
        return self.objective if isinstance(self.objective, str) else self.objective.type

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Values as this version names them, from those that version 0.1 wrote."""
        if "objectives" not in values:
            return values
        values = dict(values)
        kind, options = values.get("objective", "causal"), values.pop("objectives") or {}
        return values | {"objective": {"type": kind, **(to_plain(options.get(kind)) or {})}}


def check_ids(tokens: Tensor) -> None:
    """Raise UnsupportedShape where these are no ids (b, t)."""
    if not isinstance(tokens, Tensor):
        raise UnsupportedShape(f"tokens is a {type(tokens).__name__}; it must be a tensor of ids, (batch, time)")
    if tokens.ndim != 2:
        raise UnsupportedShape(f"tokens: shape {tuple(tokens.shape)} is not (batch, time); one row is tokens[None]")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise UnsupportedShape(f"tokens is {tokens.dtype}; ids are integers: pass tokens.long()")


class LanguageModel(SharingModule):
    """An embedding, a backbone, an output matrix and an objective.

    Example:
        >>> model = LanguageModel(LanguageModelConfig(
        ...     backbone=BackboneConfig(dim=256, depth=6, pattern=["gated_deltanet", "attention"]), vocab_size=4096))
        >>> model.loss(tokens).loss.backward()          # tokens: (b, t), int64
        >>> logits, state = model(prompt)               # (b, t, 4096)
        >>> logits, state = model(next_token, state)    # resumes after the prompt

    Raises:
        UnsupportedCall: a layer cannot serve the objective, with the remedy.
    """

    config_class = LanguageModelConfig

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        dim, stages = config.backbone.dim, config.backbone.stages
        width = stages[-1].dim if stages else dim
        if config.tie_word_embeddings and width != dim:
            raise ConfigError(
                f"tie_word_embeddings is True, but the tokens' vectors have {dim} channels and the last stage {width}: "
                "set tie_word_embeddings=False"
            )
        self.objective = entry_of(config.objective).build(width, config.vocab_size, config.objective)
        self.embedding = nn.Embedding(config.vocab_size + self.objective.extra_tokens, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.backbone = Backbone(config.backbone)
        # Tied, it also has a row for each token of the objective's own, whose logits are cut off.
        rows = self.embedding.num_embeddings if config.tie_word_embeddings else config.vocab_size
        self.head = nn.Linear(width, rows, bias=False, device="meta" if config.tie_word_embeddings else None)
        if config.tie_word_embeddings:
            share(self.head, "weight", self.embedding.get_parameter("weight"))
        else:
            nn.init.normal_(self.head.weight, std=0.02)
        self.objective.check(self)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def mask_token(self) -> int:
        """The id of the token that stands for one not yet known.

        Raises:
            UnsupportedCall: the objective has none.
        """
        if not self.objective.extra_tokens:
            raise UnsupportedCall(
                f"objective {self.config.objective_name!r} has no mask token; diffusion objectives have"
            )
        return self.config.vocab_size

    def hidden(self, tokens: Int[Tensor, "b t"], context: Context | Layout, state: State | None = None) -> Output:
        """The backbone's `Output` for embedded tokens; `logits` turns its `y` into logits.

        Raises:
            UnsupportedShape: ids outside the vocabulary (and the objective's own tokens), or no batch of rows.
        """
        check_ids(tokens)
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.embedding.num_embeddings:
                raise UnsupportedShape(
                    f"tokens: ids reach from {int(low)} to {int(high)}, and the model knows 0 to "
                    f"{self.embedding.num_embeddings - 1}; is this its tokenizer?"
                )
        return self.backbone(self.embedding(tokens), context, state)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: State | None = None,
        *,
        layout: Context | Layout | None = None,
    ) -> tuple[Float[Tensor, "b t v"], State | None]:
        """Logits for every position and, under a causal layout, the state after the last.

        Args:
            state: what an earlier call returned; the tokens then follow those that it has read.
            layout: causal by default; or a context.
        """
        out = self.hidden(tokens, Layout(causal=True) if layout is None else layout, state)
        return self.logits(out.y), out.state

    def logits(self, y: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows v"]:
        """Logits from the backbone's outputs."""
        if (known := self._output_matrix(y)) is not None:
            return F.linear(y, known)
        return self.head(y)[..., : self.vocab_size]

    def _output_matrix(self, y: Tensor) -> Float[Tensor, "v d"] | None:
        """The matrix whose products with `y` are the logits; None where only a call of the head knows them."""
        head = self.head
        if not untouched(head) or head.bias is not None:
            return None
        return head.weight[: self.vocab_size].to(y.dtype)

    def cross_entropy(
        self,
        y: Float[Tensor, "*rows d"],
        targets: Int[Tensor, "*rows"],
        *,
        z_loss: float = 0.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """`omnimix.kernels.cross_entropy` of the logits of `y`, of which only a part is held at a time."""
        if (known := self._output_matrix(y)) is not None:
            return cross_entropy(y, known, targets, z_loss=z_loss, reduction=reduction)

        def rows(y: Tensor, targets: Tensor) -> Tensor:
            logits = self.logits(y)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
            return nats + z_loss * logits.logsumexp(-1).square() * (targets != IGNORED) if z_loss else nats

        losses = self._by_rows(rows, y.flatten(0, -2), targets.flatten())
        if reduction == "none":
            return losses.view(targets.shape)
        return losses.sum() / (targets != IGNORED).sum().clamp_min(1) if reduction == "mean" else losses.sum()

    def logits_of(self, y: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Of each row's logits the target's."""
        if (known := self._output_matrix(y)) is not None:
            return (y * known[targets]).sum(-1)
        return self._by_rows(lambda y, targets: self.logits(y).gather(1, targets[:, None])[:, 0], y, targets)

    def _by_rows(self, function: Callable[[Tensor, Tensor], Tensor], y: Tensor, targets: Tensor) -> Tensor:
        """A function of the head's outputs, some rows at a time, whose logits the backward pass computes again."""
        size = max(1, LOGITS_AT_A_TIME // self.vocab_size)
        parts = zip(y.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any, **options: Any) -> None:
        # What 0.1 wrote of tied models names the matrix once.
        if self.config.tie_word_embeddings and f"{prefix}embedding.weight" in state_dict:
            state_dict.setdefault(f"{prefix}head.weight", state_dict[f"{prefix}embedding.weight"])
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

    def loss(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        counted: Bool[Tensor, "b t"] | None = None,
    ) -> ObjectiveLoss:
        """The objective's loss; see `Objective.loss`.

        Raises:
            UnsupportedCall: both `cu_seqlens` and `lengths`.
            UnsupportedShape: no token is left to be scored.
        """
        if cu_seqlens is not None and lengths is not None:
            raise UnsupportedCall("cu_seqlens, lengths: a row is packed or filled up at its end; pass one of them")
        check_ids(tokens)
        return self.objective.loss(self, tokens, cu_seqlens=cu_seqlens, lengths=lengths, counted=counted)

    def init_state(
        self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state before the first token."""
        return self.backbone.init_state(batch, device=device, dtype=dtype)
