"""Audio: from waves, of one length or of many, to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones.config import configured, positive, to_plain
from ...backbones.layout import Layout
from ...backbones.registry import build_part
from ...backbones.typed import Config
from ...errors import ConfigError, UnsupportedShape
from .fronts import FrontConfig, FrontState, list_fronts


@dataclass(frozen=True, kw_only=True)
class AudioTokenizerConfig(Config):
    """How waves become tokens.

    Args:
        dim: width of the tokens.
        front: its configuration or name: "patches" or "frames" of a log-mel spectrogram, or the "wave" itself.
        causal: whether a token depends on earlier samples only; then the model streams.
    """

    dim: int
    front: FrontConfig | str = "patches"
    causal: bool = False

    def __post_init__(self) -> None:
        positive(self, "dim")
        if self.front is None:
            raise ConfigError(f"front is None; it must be one of {', '.join(list_fronts())}")
        object.__setattr__(self, "front", configured(FrontConfig, self.front))

    @property
    def rate(self) -> int:
        """Samples a second of the waves."""
        return cast(FrontConfig, self.front).sample_rate

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Values as this version names them, from those that version 0.1 wrote."""
        if "fronts" not in values:
            return values
        values = dict(values)
        kind, options = values.get("front", "patches"), values.pop("fronts") or {}
        return values | {"front": {**(to_plain(options.get(kind)) or {}), "type": kind}}


class AudioTokenizer(nn.Module):
    """Waves to tokens, with the layout that says where they are."""

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        self.front = build_part(config.front, config.dim, config.causal)

    def forward(self, waves: Float[Tensor, "b n"] | Sequence[Tensor]) -> tuple[Float[Tensor, "b t d"], Layout]:
        """Tokens and their layout.

        Args:
            waves: one channel each, floating point, at the configured rate; clips of one length as `(b, n)`, or a list
                of clips `(n,)` of any lengths, whose tokens are packed: one row, and `layout.cu_seqlens`.

        Raises:
            UnsupportedShape: no clip, an empty one, more than one channel, or integers.
        """
        if isinstance(waves, Tensor):
            _check(waves, 2)
            return self.front(waves)
        if not waves:
            raise UnsupportedShape("waves is an empty list; pass at least one clip")
        for clip in waves:
            _check(clip, 1)
        return self._packed(waves)

    def stream(
        self, waves: Float[Tensor, "b n"], state: FrontState | None = None
    ) -> tuple[Float[Tensor, "b t d"], Layout, FrontState]:
        """The tokens that further samples complete, none or more, and the state for the next call; for causal models.

        Raises:
            UnsupportedCall: the front does not stream.
            UnsupportedShape: the waves are not a floating-point (b, n), or the state has another number of rows.
        """
        _check(waves, 2, empty=True)
        if state is not None and state.kept[0].shape[0] != waves.shape[0]:
            raise UnsupportedShape(f"waves has {waves.shape[0]} rows, and the state {state.kept[0].shape[0]}")
        tokens, after = self.front.stream(waves, state)
        return tokens, Layout(causal=True), after

    def _packed(self, waves: Sequence[Float[Tensor, " _"]]) -> tuple[Float[Tensor, "1 t d"], Layout]:
        rows: dict[int, tuple[Tensor, Layout]] = {}
        # Clips of one length go through the front together.
        for length in dict.fromkeys(clip.shape[0] for clip in waves):
            which = [i for i, clip in enumerate(waves) if clip.shape[0] == length]
            tokens, layout = self.front(torch.stack([waves[i] for i in which]))
            rows |= {i: (row, layout) for i, row in zip(which, tokens, strict=True)}
        offsets, extra = [0], []
        for i in range(len(waves)):
            row, layout = rows[i]
            extra += [offsets[-1] + at for at in layout.extra]
            offsets.append(offsets[-1] + row.shape[0])
        packed = torch.cat([rows[i][0] for i in range(len(waves))])[None]
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=packed.device)
        return packed, Layout(causal=self.config.causal, cu_seqlens=cu_seqlens, extra=tuple(extra))


def _check(waves: Tensor, dimensions: int, *, empty: bool = False) -> None:
    if waves.ndim != dimensions:
        shape = "(clips, samples)" if dimensions == 2 else "(samples,)"
        raise UnsupportedShape(f"waves is {tuple(waves.shape)}; it must be {shape}, channels mixed into one")
    if 0 in waves.shape and not (empty and waves.shape[0]):
        raise UnsupportedShape(f"waves is {tuple(waves.shape)}; a clip needs at least one sample")
    if not waves.is_floating_point():
        raise UnsupportedShape(f"waves is {waves.dtype}; it must be floating point, in -1..1")
