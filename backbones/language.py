"""Language models: token ids in, logits or a loss out, around any backbone and any objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..kernels import linear
from .backbone import Backbone
from .config import BackboneConfig, ObjectiveConfig, configured, positive, to_plain
from .context import Context
from .heads import ObjectiveLoss
from .layer import Output
from .layout import Layout
from .registry import entry_of
from .state import State
from .typed import Config


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """A language model.

    Args:
        backbone: its `scan` is "forward" under causal objectives, and "both" under diffusion.
        vocabulary: token ids are 0 … vocabulary − 1. An objective may add tokens of its own after them (the mask).
        objective: what it is trained for: its configuration or name; see `list_objectives()`.
        tie: whether the output matrix is the embedding (arXiv 1608.05859).
    """

    backbone: BackboneConfig
    vocabulary: int
    objective: ObjectiveConfig | str = "causal"
    tie: bool = True

    def __post_init__(self) -> None:
        positive(self, "vocabulary")
        object.__setattr__(self, "objective", configured(ObjectiveConfig, self.objective))

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Values as this version names them, from those that version 0.1 wrote."""
        if "objectives" not in values:
            return values
        values = dict(values)
        kind, options = values.get("objective", "causal"), values.pop("objectives") or {}
        return values | {"objective": {"type": kind, **(to_plain(options.get(kind)) or {})}}


class LanguageModel(nn.Module):
    """An embedding, a backbone, an output matrix and an objective.

    Example:
        >>> model = LanguageModel(LanguageModelConfig(
        ...     backbone=BackboneConfig(dim=256, depth=6, pattern=["gated_deltanet", "attention"]), vocabulary=4096))
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
        if config.tie and width != dim:
            raise ConfigError(
                f"tie is True, but the tokens' vectors have {dim} channels and the last stage {width}: set tie=False"
            )
        self.objective = entry_of(config.objective).build(width, config.vocabulary, config.objective)
        self.embedding = nn.Embedding(config.vocabulary + self.objective.extra_tokens, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.backbone = Backbone(config.backbone)
        self.head = None if config.tie else nn.Linear(width, config.vocabulary, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
        self.objective.check(self)

    @property
    def vocabulary(self) -> int:
        return self.config.vocabulary

    @property
    def mask_token(self) -> int:
        """The id of the token that stands for one not yet known.

        Raises:
            UnsupportedCall: the objective has none.
        """
        if not self.objective.extra_tokens:
            raise UnsupportedCall(
                f"objective {self.config.objective.type!r} has no mask token; diffusion objectives have"
            )
        return self.config.vocabulary

    def hidden(self, tokens: Int[Tensor, "b t"], context: Context | Layout, state: State | None = None) -> Output:
        """The backbone's `Output` for embedded tokens; `logits` turns its `y` into logits.

        Raises:
            UnsupportedShape: ids outside the vocabulary (and the objective's own tokens), or no batch of rows.
        """
        if tokens.ndim != 2:
            raise UnsupportedShape(f"tokens: shape {tuple(tokens.shape)} is not (batch, time)")
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
        return linear(y, self.output_weight(y))

    def output_weight(self, y: Tensor) -> Float[Tensor, "v d"]:
        """The output matrix, in the dtype of the backbone's outputs `y`."""
        weight = self.embedding.weight[: self.vocabulary] if self.head is None else self.head.weight
        return weight.to(y.dtype)

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
        return self.objective.loss(self, tokens, cu_seqlens=cu_seqlens, lengths=lengths, counted=counted)

    def init_state(
        self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state before the first token."""
        return self.backbone.init_state(batch, device=device, dtype=dtype)
