"""What the classifiers of every modality share: a tokenizer, a backbone and a head."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack

from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import Backbone, BackboneConfig, BlockConfig, Layout
from ...backbones.config import FFNConfig, MixerConfig
from ...backbones.heads import ClassificationHead, ClassificationHeadConfig
from ...backbones.layer import Output, unfit
from ...backbones.mixers import get_mixer
from ...errors import ConfigError, UnsupportedCall


class Classifier(nn.Module):
    """Inputs to logits.

    Args:
        tokenizer: from inputs to tokens (b, t, dim) and their layout; its configuration is its `config`.
        backbone: its width is the tokenizer's.
        head: of the classification.
    """

    tokenizer: Any
    config: Any

    def __init__(self, tokenizer: nn.Module, backbone: BackboneConfig, head: ClassificationHeadConfig):
        super().__init__()
        self.tokenizer = tokenizer
        self.backbone = Backbone(backbone)
        self.head = ClassificationHead(self.backbone.stages[-1].dim, head)

    @classmethod
    def examples(cls) -> list[tuple[Any, list[Any]]]:
        """Small configurations, each with batches of two or more of every kind that it serves, for the laws."""
        raise NotImplementedError(f"{cls.__name__} has no examples; the laws in tests/laws need them")

    def forward(self, inputs: Any) -> Float[Tensor, "n *t classes"]:
        """Logits, `(n, classes)`, one row per input; see `ClassificationHead` for other pools.

        Args:
            inputs: what the tokenizer takes, prepared as the model was trained.
        """
        return self.forward_head(*self.forward_features(inputs))

    def forward_with_losses(self, inputs: Any) -> tuple[Float[Tensor, "n *t classes"], dict[str, Tensor]]:
        """Logits, and by name the losses of the backbone's routed experts, weighted: add them to the training loss."""
        tokens, layout = self.tokenizer(inputs)
        out = self.backbone(tokens, layout)
        return self.head(out.y, layout_of(out, layout)), out.losses

    def forward_features(self, inputs: Any) -> tuple[Float[Tensor, "b t d"], Layout]:
        """The backbone's tokens after its last norm, and where they are."""
        tokens, layout = self.tokenizer(inputs)
        out = self.backbone(tokens, layout)
        return out.y, layout_of(out, layout)

    def forward_head(self, tokens: Float[Tensor, "b t d"], layout: Layout) -> Float[Tensor, "n *t classes"]:
        """Logits from what `forward_features` returned."""
        return self.head(tokens, layout)

    def head_of(self, features: Float[Tensor, "n *t d"]) -> Float[Tensor, "n *t classes"]:
        """Logits from tokens that are pooled already."""
        return self.head.classifier(self.head.dropout(features))

    def check_streaming(self) -> None:
        """Raise UnsupportedCall unless the model can stream, that is, take its input in chunks."""
        if not self.tokenizer.config.causal:
            raise UnsupportedCall("this model takes whole inputs; build it with causal=True to stream")
        if self.head.config.pool != "mean":
            raise UnsupportedCall(f"the head pools by {self.head.config.pool!r}; streaming needs 'mean'")
        if name := unfit(self.backbone, lambda can: can.streaming):
            raise UnsupportedCall(f"{name} does not resume from a state; use another layer")


def layout_of(out: Output, before: Layout) -> Layout:
    """Where the tokens of an output are; transitions between stages may have moved them."""
    return before if out.context is None else out.context.layout


class ShortForm(TypedDict, total=False):
    """The short form of a backbone: the fields that are set most often.

    Attributes:
        mixer: by name; several, joined by commas, are tiled over the depth ("gla,gla,attention"), and joined by "+"
            they run in parallel ("attention+gla").
        mixers: options by mixer name.
        dim, depth, ffn, scan, drop_path: as in `BackboneConfig`.
    """

    mixer: str
    dim: int
    depth: int
    ffn: FFNConfig | str | None
    mixers: dict[str, MixerConfig]
    scan: str
    drop_path: float


Pool = Literal["mean", "max", "class_token", "none"]
SHORT = tuple(ShortForm.__annotations__)


def plain_backbone(
    backbone: BackboneConfig | None = None, *, positions: bool, **short: Unpack[ShortForm]
) -> BackboneConfig:
    """A backbone for a classifier: the one given, or a ViT-shaped one around a mixer or several, from its short form.

    Args:
        backbone: the configuration; None builds one, with the scan "bidirectional".
        positions: whether the tokens bring positions; attention without options of its own then has no rotary ones.
        short: what differs from it; see `ShortForm`.

    Raises:
        UnknownName: an unknown mixer, scan or feed-forward layer.
        ConfigError: values that do not fit.
    """
    changed: dict[str, Any] = dict(short)
    if "mixer" in changed:
        changed["pattern"] = tuple(part.strip() for part in changed.pop("mixer").split(","))
    if backbone is None:
        if missing := [name for name in ("mixer", "dim", "depth") if name not in short]:
            raise ConfigError(f"pass a backbone, or its short form with {', '.join(missing)}")
        patterns, mixers = [changed["pattern"]], changed.pop("mixers", None) or {}
    else:
        patterns = [changed.get("pattern", backbone.pattern), *(stage.pattern for stage in backbone.stages)]
        mixers = changed.pop("mixers", None) or backbone.mixers
    named = [BlockConfig.of(entry).mixer for pattern in patterns for entry in pattern]
    for name in dict.fromkeys(name for entry in named if isinstance(entry, str) for name in entry.split("+")):
        config = get_mixer(name).config
        if positions and "rope" in config.__dataclass_fields__:
            mixers = {name: config(rope=False)} | mixers
    if backbone is None:
        changed.setdefault("scan", "bidirectional")
        return BackboneConfig(**changed, mixers=mixers)
    return replace(backbone, **changed, mixers=mixers)


def pattern_name(backbone: BackboneConfig) -> str:
    """The mixers of a backbone as its short form writes them; with stages those of each."""
    patterns = [stage.pattern or backbone.pattern for stage in backbone.stages] or [backbone.pattern]
    blocks = [BlockConfig.of(entry) for pattern in patterns for entry in pattern]
    mixers = [block.mixer.type if isinstance(block.mixer, MixerConfig) else block.mixer or "none" for block in blocks]
    return ",".join(mixers)


def check_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError where a name is none of the known options; it names the nearest."""
    known = sorted(known)
    for name in sorted(set(names) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        raise ConfigError(f"there is no option {name!r}; {hint}")


def parted(options: dict[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a classifier's factory as those called `own` and those of the backbone's short form.

    Raises:
        ConfigError: an option that is neither, with the nearest.
    """
    own = set(own)
    check_known(options, [*own, *SHORT, "backbone", "classes", "pool", "dropout"])
    return (
        {name: value for name, value in options.items() if name in own},
        {name: value for name, value in options.items() if name in SHORT},
    )
