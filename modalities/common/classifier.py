"""What the classifiers of every modality share: a tokenizer, a backbone and a head."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import Backbone, BackboneConfig, Layout
from ...backbones.config import FFNConfig, MixerConfig
from ...backbones.heads import ClassificationHead, ClassificationHeadConfig
from ...backbones.layer import unfit
from ...backbones.mixers import get_mixer
from ...backbones.parameters import remember_marks
from ...errors import UnsupportedCall


class Classifier(nn.Module):
    """Media to logits.

    Args:
        tokenizer: from media to tokens (b, t, dim) and their layout; it has its configuration as `config`.
        backbone: its width is the tokenizer's.
        head: of the classification.
    """

    def __init__(self, tokenizer: nn.Module, backbone: BackboneConfig, head: ClassificationHeadConfig):
        super().__init__()
        self.tokenizer = tokenizer
        self.backbone = Backbone(backbone)
        self.head = ClassificationHead(backbone.dim, head)
        remember_marks(self)

    @classmethod
    def examples(cls) -> list[tuple[Any, list[Any]]]:
        """Small configurations, each with batches of two or more of every kind that it serves, for the laws."""
        raise NotImplementedError(f"{cls.__name__} has no examples; the laws in tests/laws need them")

    def forward(self, media: Any) -> Float[Tensor, "n *t classes"]:
        """Logits, `(n, classes)`, one row a medium; see `ClassificationHead` for other pools.

        Args:
            media: what the tokenizer takes, prepared as the model was trained.
        """
        return self.forward_head(*self.forward_features(media))

    def forward_with_losses(self, media: Any) -> tuple[Float[Tensor, "n *t classes"], dict[str, Tensor]]:
        """Logits, and by name the losses of the backbone's routed experts, weighted: add them to the training loss."""
        tokens, layout = self.tokenizer(media)
        out = self.backbone(tokens, layout)
        return self.head(out.y, layout), out.losses

    def forward_features(self, media: Any) -> tuple[Float[Tensor, "b t d"], Layout]:
        """The backbone's tokens after its last norm, and where they are."""
        tokens, layout = self.tokenizer(media)
        return self.backbone(tokens, layout).y, layout

    def forward_head(self, tokens: Float[Tensor, "b t d"], layout: Layout) -> Float[Tensor, "n *t classes"]:
        """Logits from what `forward_features` returned."""
        return self.head(tokens, layout)

    def head_of(self, features: Float[Tensor, "n *t d"]) -> Float[Tensor, "n *t classes"]:
        """Logits from tokens that are pooled already."""
        return self.head.classifier(self.head.dropout(features))

    def check_streaming(self) -> None:
        """Of models that can be given their media in pieces: raise UnsupportedCall where this one cannot."""
        if not self.tokenizer.config.causal:
            raise UnsupportedCall("this model takes its media whole; build it with causal=True to stream")
        if self.head.config.pool != "mean":
            raise UnsupportedCall(f"the head pools by {self.head.config.pool!r}; streaming needs 'mean'")
        if name := unfit(self.backbone, lambda can: can.streaming):
            raise UnsupportedCall(f"{name} does not resume from a state; use another layer")


def plain_backbone(
    *,
    mixer: str,
    dim: int,
    depth: int,
    positions: bool,
    scan: str = "both",
    ffn: FFNConfig | str | None = "swiglu",
    mixers: dict[str, MixerConfig] | None = None,
    drop_path: float = 0.0,
) -> BackboneConfig:
    """A ViT-shaped backbone around one mixer or several.

    Args:
        mixer: by name; several, joined by commas, are tiled over the depth ("gla,gla,attention"), and joined by "+"
            they run in parallel ("attention+gla").
        positions: whether the tokens bring positions; attention then has no rotary ones.
        scan: the orders in which mixers that only look backwards run over the tokens; the others ignore it.
        mixers: options by mixer name.

    Raises:
        UnknownName: no such mixer, scan or feed-forward layer.
    """
    pattern = tuple(part.strip() for part in mixer.split(","))
    options: dict[str, Any] = {}
    for name in dict.fromkeys(name for entry in pattern for name in entry.split("+")):
        config = get_mixer(name).config
        if positions and "rope" in config.__dataclass_fields__:
            options[name] = config(rope=False)
    return BackboneConfig(
        dim=dim,
        depth=depth,
        pattern=pattern,
        mixers=options | (mixers or {}),
        ffn=ffn,
        scan=scan,
        drop_path=drop_path,
    )
