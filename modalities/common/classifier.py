"""What the classifiers of every modality share: a tokenizer, a backbone and a head."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import Backbone, BackboneConfig, BlockConfig, Layout
from ...backbones.heads import ClassificationHead, ClassificationHeadConfig
from ...backbones.layer import Output, unfit
from ...backbones.mixers import get_mixer
from ...backbones.parameters import remember_marks
from ...errors import ConfigError, UnsupportedCall


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
        self.head = ClassificationHead(self.backbone.stages[-1].dim, head)
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
        return self.head(out.y, _layout(out, layout)), out.losses

    def forward_features(self, media: Any) -> tuple[Float[Tensor, "b t d"], Layout]:
        """The backbone's tokens after its last norm, and where they are."""
        tokens, layout = self.tokenizer(media)
        out = self.backbone(tokens, layout)
        return out.y, _layout(out, layout)

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


def _layout(out: Output, before: Layout) -> Layout:
    """Where the tokens of an output are; transitions between stages may have moved them."""
    return before if out.context is None else out.context.layout


# The short form of a backbone: what is most often said of one.
SHORT = ("mixer", "dim", "depth", "ffn", "mixers", "scan", "drop_path")


def plain_backbone(backbone: BackboneConfig | None = None, *, positions: bool, **short: Any) -> BackboneConfig:
    """A backbone for a classifier: the one given, or a ViT-shaped one around a mixer or several, from its short form.

    Args:
        backbone: the configuration; None builds one, with the scan "both".
        positions: whether the tokens bring positions; attention without options of its own then has no rotary ones.
        short: fields that differ: `mixer`, by name (several, joined by commas, are tiled over the depth,
            "gla,gla,attention", and joined by "+" they run in parallel, "attention+gla"), `dim`, `depth`, `ffn`,
            `mixers` (options by mixer name), `scan` and `drop_path`.

    Raises:
        UnknownName: no such mixer, scan or feed-forward layer.
        ConfigError: values that do not fit.
    """
    if "mixer" in short:
        short["pattern"] = tuple(part.strip() for part in short.pop("mixer").split(","))
    if backbone is None:
        missing = [name for name in ("pattern", "dim", "depth") if name not in short]
        if missing:
            raise ConfigError(
                f"pass a backbone, or its short form with {', '.join(missing).replace('pattern', 'mixer')}"
            )
        pattern, mixers = short["pattern"], short.pop("mixers", None) or {}
    else:
        pattern, mixers = short.get("pattern", backbone.pattern), short.pop("mixers", None) or backbone.mixers
    named = [BlockConfig.of(entry).mixer for entry in pattern]
    for name in dict.fromkeys(name for entry in named if isinstance(entry, str) for name in entry.split("+")):
        config = get_mixer(name).config
        if positions and "rope" in config.__dataclass_fields__:
            mixers = {name: config(rope=False)} | mixers
    if backbone is None:
        return BackboneConfig(**{"scan": "both"} | short, mixers=mixers)
    return replace(backbone, **short, mixers=mixers)


def pattern_name(backbone: BackboneConfig) -> str:
    """The mixers of a backbone as its short form writes them."""
    blocks = [BlockConfig.of(entry) for entry in backbone.pattern]
    mixers = [getattr(block.mixer, "type", block.mixer) or "none" for block in blocks]
    return ",".join(mixers)


def parted(options: dict[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a classifier's factory as those called `own` and those of the backbone's short form.

    Raises:
        ConfigError: an option that is neither, with the nearest.
    """
    own = set(own)
    known = sorted([*own, *SHORT, "backbone", "classes", "pool", "dropout"])
    for name in options.keys() - own - set(SHORT):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        raise ConfigError(f"there is no option {name!r}; {hint}")
    return (
        {name: value for name, value in options.items() if name in own},
        {name: value for name, value in options.items() if name in SHORT},
    )
