"""Images: from tensors of any size to tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones.config import not_negative, positive
from ...backbones.layout import Layout
from ...backbones.typed import Config
from ...errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..common.grid import GridTokenizer, check_extra, pad_to_whole, resize_kernel, resize_table, sizes, strided_product
from .stem import ConvStem

POSITIONS = ("learned", "factorised", "none")


@dataclass(frozen=True, kw_only=True)
class PatchTokenizerConfig(Config):
    """How images become tokens.

    Args:
        dim: width of the tokens.
        patch: pixels of a patch, one number or (height, width).
        channels: of the images.
        size: the image size, one number or (height, width), that positions are learned for. Images of any other size
            are served too: their positions are interpolated.
        positions: "learned", one vector per position; "factorised", one per row plus one per column; "none", for
            mixers that know the order of the tokens by themselves.
        class_token: None; "first"; or "middle" of the grid tokens (Vision Mamba).
        registers: learned tokens at the end of the sequence, scratch space that no head reads.
        stem: how pixels become tokens: "patch", one product a patch; or "conv", a stack of small convolutions, which
            needs less data (see `ConvStem`). The sides of a patch are then powers of two.
        stem_depth: residual blocks at each scale of the stem "conv".
    """

    dim: int
    patch: int | tuple[int, int] = 16
    channels: int = 3
    size: int | tuple[int, int] = 224
    positions: Literal["learned", "factorised", "none"] = "learned"
    class_token: Literal["first", "middle"] | None = None
    registers: int = 0
    stem: Literal["patch", "conv"] = "patch"
    stem_depth: int = 1

    def __post_init__(self) -> None:
        positive(self, "dim", "channels")
        for name in ("patch", "size"):
            object.__setattr__(self, name, sizes(self, name, ("height", "width")))
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}")
        check_extra(self)
        not_negative(self, "stem_depth")
        patch = cast("tuple[int, int]", self.patch)
        if self.stem == "conv" and (max(patch) < 2 or any(side & (side - 1) for side in patch)):
            raise ConfigError(f"patch is {patch}; the stem 'conv' halves its sides: take powers of two, at least 2")

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches in an image of `size` (by default the size that positions are learned for)."""
        (height, width), (down, across) = cast("tuple[tuple[int, int], ...]", (size or self.size, self.patch))
        return math.ceil(height / down), math.ceil(width / across)


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product.

    The weights are a convolution's, so that checkpoints and tools that adapt input channels find what they know.
    """

    bias: nn.Parameter

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        return strided_product(images, self.weight, self.bias)


class PatchTokenizer(GridTokenizer):
    """Images to tokens, one a patch, in raster order, with the layout that says where they are.

    Any size and aspect is served: the image is padded with zeros at the bottom and right up to whole patches, and
    positions are interpolated to its grid. The class token, where there is one, is the first of `layout.extra`.
    """

    def __init__(self, config: PatchTokenizerConfig):
        super().__init__()
        self.config = config
        patch = cast("tuple[int, int]", config.patch)
        self.proj: PatchProjection | ConvStem
        if config.stem == "conv":
            self.proj = ConvStem(config.channels, config.dim, patch, config.stem_depth)
        else:
            self.proj = PatchProjection(config.channels, config.dim, patch, stride=patch)
            nn.init.trunc_normal_(self.proj.weight, std=self.proj.weight[0].numel() ** -0.5)
            nn.init.zeros_(self.proj.bias)
        rows, columns = config.grid()
        learned, factorised = config.positions == "learned", config.positions == "factorised"
        self.positions = self._table(rows, columns) if learned else None
        self.row_positions = self._table(rows) if factorised else None
        self.column_positions = self._table(columns) if factorised else None
        self._make_extra()

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b t d"], Layout]:
        """Tokens and their layout.

        Args:
            images: floating point, normalised as the model was trained.

        Raises:
            UnsupportedShape: an empty image, another number of channels, or integers.
        """
        if images.ndim != 4:
            raise UnsupportedShape(f"images: shape {tuple(images.shape)} is not (b, c, h, w)")
        channels, height, width = images.shape[1:]
        if channels != self.config.channels:
            raise UnsupportedShape(
                f"images has {channels} channels, but the tokenizer was built with channels={self.config.channels}"
            )
        if height < 1 or width < 1:
            raise UnsupportedShape(f"images is {height} x {width}; an image needs at least one pixel")
        if not images.is_floating_point():
            raise UnsupportedShape(f"images is {images.dtype}; it must be floating point (load_image gives 0..1)")
        rows, columns = self.config.grid((height, width))
        tokens = self.proj(pad_to_whole(images, self.config.patch))
        positions = self.place_vectors(rows, columns)
        if positions is not None:
            tokens = tokens + positions.to(tokens.dtype)
        layout = Layout(causal=False, grid=(1, rows, columns), extra=self.extra(rows * columns))
        return self._with_extra(tokens), layout

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.proj.parameters()).dtype

    def place_vectors(self, rows: int, columns: int) -> Float[Tensor, "t d"] | None:
        """The position embeddings of a grid of this size, in raster order; None where there are none."""
        if self.positions is not None:
            return resize_table(self.positions, rows, columns).flatten(0, 1)
        if self.row_positions is not None and self.column_positions is not None:
            down, across = resize_table(self.row_positions, rows), resize_table(self.column_positions, columns)
            return (down[:, None] + across).flatten(0, 1)
        return None

    @torch.no_grad()
    def resize(self, *, size: int | tuple[int, int] | None = None, patch: int | tuple[int, int] | None = None) -> None:
        """Rebuild the parameters for another image size or patch, keeping what they mean.

        Positions are interpolated, and the patch kernel is resized (`resize_kernel`).

        Raises:
            UnsupportedCall: another patch, and the stem is "conv".
        """
        if patch is not None and isinstance(self.proj, ConvStem):
            raise UnsupportedCall("the strides of the stem 'conv' make its patch; build the model with another one")
        old_patch = self.config.patch
        self.config = replace(self.config, size=size or self.config.size, patch=patch or old_patch)
        if self.config.patch != old_patch and isinstance(self.proj, PatchProjection):
            projection = PatchProjection(
                self.config.channels, self.config.dim, self.config.patch, stride=self.config.patch, device="meta"
            )
            kernel = resize_kernel(self.proj.weight, *self.config.patch)
            projection.weight, projection.bias = nn.Parameter(kernel, self.proj.weight.requires_grad), self.proj.bias
            self.proj = projection
        self._resize_tables()

    def _all_tables(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.config.grid()
        return {"positions": (rows, columns), "row_positions": (rows,), "column_positions": (columns,)}
