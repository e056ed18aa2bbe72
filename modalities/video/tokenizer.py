"""Videos: from tensors of any length and size to tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones.config import positive
from ...backbones.layout import Layout
from ...backbones.typed import Config
from ...errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..common.grid import GridTokenizer, check_extra, pad_to_whole, resize_kernel, resize_table, sizes, strided_product
from ..image.tokenizer import PatchProjection, PatchTokenizer
from .reduction import Grid, average_cells, merge_tokens

POSITIONS = ("factorised", "none")
TIME_POSITIONS = ("learned", "sinusoidal", "none")
INFLATIONS = ("central", "mean")
_AXES = ("t", "h", "w")


@dataclass(frozen=True, kw_only=True)
class TubeletTokenizerConfig(Config):
    """How videos become tokens.

    Args:
        dim: width of the tokens.
        tubelet: frames, and pixels down and across, of what becomes one token; one number or (t, h, w).
        channels: of the frames.
        size: frames, height and width that positions are learned for. Videos of any other length and size are served
            too: their positions are interpolated.
        positions: "factorised", a learned vector a place in the frame plus one a time step; "none".
        time_positions: the vectors of the time steps: "learned"; "sinusoidal", which do not depend on the length
            (arXiv 1706.03762, section 3.5); or "none". By default "learned", and "sinusoidal" where `causal`.
        class_token: None; "first" (VideoMamba); or "middle" of the grid tokens.
        registers: learned tokens at the end of the sequence, scratch space that no head reads.
        group: (t, h, w) neighbouring cells of the grid whose mean becomes one token.
        merge: tokens that are left of every time step, after `group`; others are merged into them (`merge_tokens`).
        causal: a token sees itself and what came before: for models that stream.
    """

    dim: int
    tubelet: int | tuple[int, int, int] = (1, 16, 16)
    channels: int = 3
    size: int | tuple[int, int, int] = (8, 224, 224)
    positions: Literal["factorised", "none"] = "factorised"
    time_positions: Literal["learned", "sinusoidal", "none"] | None = None
    class_token: Literal["first", "middle"] | None = None
    registers: int = 0
    group: int | tuple[int, int, int] = (1, 1, 1)
    merge: int | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        positive(self, "dim", "channels", "merge")
        for name in ("tubelet", "size", "group"):
            object.__setattr__(self, name, sizes(self, name, _AXES))
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}")
        if self.time_positions is None:
            object.__setattr__(self, "time_positions", "sinusoidal" if self.causal else "learned")
        if self.time_positions not in TIME_POSITIONS:
            raise ConfigError(
                f"time_positions is {self.time_positions!r}; it must be one of {', '.join(TIME_POSITIONS)}"
            )
        check_extra(self)
        if not self.causal:
            return
        if self.positions == "factorised" and self.time_positions == "learned":
            raise ConfigError(
                "time_positions is 'learned' with causal=True; they depend on how long the video will be, "
                "so set 'sinusoidal' or 'none'"
            )
        if self.class_token is not None or self.registers:
            raise ConfigError(
                f"class_token is {self.class_token!r} and registers {self.registers} with causal=True; "
                "a stream has no place for them, so set None and 0"
            )

    def grid(self, size: Grid | None = None) -> Grid:
        """Tubelets in time, down and across in a video of `size` (by default that which positions are learned for)."""
        sides = zip(cast(Grid, size or self.size), cast(Grid, self.tubelet), strict=True)
        return cast(Grid, tuple(math.ceil(n / side) for n, side in sides))

    @property
    def step(self) -> int:
        """Frames of a time step of the tokens."""
        return cast(Grid, self.tubelet)[0] * cast(Grid, self.group)[0]


def sinusoids(length: int, dim: int, start: int = 0) -> Float[Tensor, "length dim"]:
    """Sines, then cosines, of the places from `start` on (arXiv 1706.03762, section 3.5)."""
    half = (dim + 1) // 2
    # Float64, for the angles of places far from the start.
    place = torch.arange(start, start + length, dtype=torch.float64)
    angles = place[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


class TubeletProjection(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product; the weights are a convolution's."""

    bias: nn.Parameter

    def forward(self, videos: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b n d"]:
        return strided_product(videos, self.weight, self.bias)


class TubeletTokenizer(GridTokenizer):
    """Videos to tokens, one a tubelet, time step by time step in raster order, with the layout of where they are.

    Any length and size is served: the video is padded with zeros at the end, the bottom and the right up to whole
    tubelets, and positions are interpolated to its grid. The class token, where there is one, is the first of
    `layout.extra`.
    """

    def __init__(self, config: TubeletTokenizerConfig):
        super().__init__()
        self.config = config
        self.proj = TubeletProjection(config.channels, config.dim, config.tubelet, stride=config.tubelet)
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.proj.bias)
        steps, rows, columns = config.grid()
        factorised = config.positions == "factorised"
        self.positions = self._table(rows, columns) if factorised else None
        self.time_positions = self._table(steps) if factorised and config.time_positions == "learned" else None
        self._make_extra()

    def forward(self, videos: Float[Tensor, "b c t h w"], start: int = 0) -> tuple[Float[Tensor, "b n d"], Layout]:
        """Tokens and their layout.

        Args:
            videos: floating point, normalised as the model was trained.
            start: tubelets in time that came before, in a stream of a causal tokenizer.

        Raises:
            UnsupportedShape: an empty video, another number of channels, or integers.
            UnsupportedCall: a start where the tokenizer is not causal.
        """
        self.check(videos)
        if min(videos.shape[2:]) < 1:
            raise UnsupportedShape(f"videos is {tuple(videos.shape)}; a video needs at least one frame and pixel")
        if start and not self.config.causal:
            raise UnsupportedCall(f"start is {start}; only a tokenizer with causal=True continues a video")
        grid = self.config.grid(tuple(videos.shape[2:]))
        tokens = self._with_positions(self.proj(pad_to_whole(videos, self.config.tubelet)), grid, start)
        tokens, grid = average_cells(tokens, grid, self.config.group)
        if self.config.merge is not None:
            tokens, grid, _ = merge_tokens(tokens, grid, self.config.merge)
        extra, rows = self.extra(tokens.shape[1]), self.config.merge is None
        return self._with_extra(tokens), Layout(causal=self.config.causal, grid=grid, extra=extra, rows=rows)

    def check(self, videos: Float[Tensor, "b c t h w"]) -> None:
        """Raise UnsupportedShape where the channels or the dtype of `videos` are not what was configured."""
        if videos.shape[1] != self.config.channels:
            raise UnsupportedShape(
                f"videos has {videos.shape[1]} channels, but the tokenizer was built with "
                f"channels={self.config.channels}; the order is (b, c, t, h, w)"
            )
        if not videos.is_floating_point():
            raise UnsupportedShape(f"videos is {videos.dtype}; it must be floating point, normalised as in training")

    def _with_positions(self, tokens: Float[Tensor, "b n d"], grid: Grid, start: int) -> Float[Tensor, "b n d"]:
        if self.positions is None:
            return tokens
        space = resize_table(self.positions, *grid[1:]).flatten(0, 1).to(tokens.dtype)
        tokens = tokens.unflatten(1, (grid[0], -1)) + space
        time = None
        if self.time_positions is not None:
            time = resize_table(self.time_positions, grid[0])
        elif self.config.time_positions == "sinusoidal":
            time = sinusoids(grid[0], self.config.dim, start)
        if time is not None:
            tokens = tokens + time.to(device=tokens.device, dtype=tokens.dtype)[:, None]
        return tokens.flatten(1, 2)

    @torch.no_grad()
    def resize(self, *, size: Grid | None = None, tubelet: Grid | None = None) -> None:
        """Rebuild the parameters for another size (t, h, w) or tubelet, keeping what they mean.

        Positions are interpolated, and the tubelet's kernel is resized (`resize_kernel`).
        """
        old = self.config.tubelet
        self.config = replace(self.config, size=size or self.config.size, tubelet=tubelet or old)
        if self.config.tubelet != old:
            self._set_kernel(resize_kernel(self.proj.weight, *self.config.tubelet))
        self._resize_tables()

    def _set_kernel(self, kernel: Float[Tensor, "d c t h w"]) -> None:
        config = self.config
        projection = TubeletProjection(
            config.channels, config.dim, config.tubelet, stride=config.tubelet, device="meta"
        )
        projection.weight, projection.bias = nn.Parameter(kernel, self.proj.weight.requires_grad), self.proj.bias
        self.proj = projection

    def _all_tables(self) -> dict[str, tuple[int, ...]]:
        steps, rows, columns = self.config.grid()
        return {"positions": (rows, columns), "time_positions": (steps,)}


@torch.no_grad()
def inflate(
    image: PatchTokenizer,
    *,
    frames: int = 8,
    tubelet: int = 1,
    inflation: Literal["central", "mean"] = "central",
    time_positions: Literal["learned", "sinusoidal", "none"] = "learned",
) -> TubeletTokenizer:
    """A video tokenizer initialised from a trained image tokenizer; the backbone's weights load unchanged.

    Args:
        image: its patch, positions, class token and registers are taken over.
        frames: of the videos that positions are learned for.
        tubelet: frames of a tubelet.
        inflation: "central", the patch's kernel in the middle frame and zeros in the others (ViViT, arXiv 2103.15691,
            section 3.4, eq. 9); "mean", an equal fraction of it in every frame (eq. 8; I3D, arXiv 1705.07750, section
            2.4), so that a still video gives the image's tokens.
        time_positions: learned ones begin as zeros.

    Raises:
        ConfigError: an unknown inflation, or an image tokenizer with the stem "conv".
    """
    if not isinstance(image.proj, PatchProjection):
        raise ConfigError(f"the image tokenizer has the stem {image.config.stem!r}; only 'patch' can be inflated")
    if inflation not in INFLATIONS:
        raise ConfigError(f"inflation is {inflation!r}; it must be one of {', '.join(INFLATIONS)}")
    own = image.config
    video = TubeletTokenizer(
        TubeletTokenizerConfig(
            dim=own.dim,
            tubelet=(tubelet, *own.patch),
            channels=own.channels,
            size=(frames, *own.size),
            positions="none" if own.positions == "none" else "factorised",
            time_positions=time_positions,
            class_token=own.class_token,
            registers=own.registers,
        )
    ).to(image.proj.weight.device, image.proj.weight.dtype)
    kernel = image.proj.weight[:, :, None]
    if inflation == "mean":
        video.proj.weight.copy_((kernel / tubelet).expand_as(video.proj.weight))
    else:
        video.proj.weight.zero_()
        video.proj.weight[:, :, tubelet // 2] = kernel[:, :, 0]
    video.proj.bias.copy_(image.proj.bias)
    places = image.place_vectors(*own.grid())
    if places is not None and video.positions is not None:
        video.positions.copy_(places.unflatten(0, own.grid()))
    if video.time_positions is not None:
        video.time_positions.zero_()
    for name in ("class_token", "registers"):
        if getattr(image, name) is not None:
            getattr(video, name).copy_(getattr(image, name))
    return video
