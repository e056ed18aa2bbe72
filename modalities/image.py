"""Images: from a file to a tensor, and from tensors of any size to tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones.config import positive
from ..backbones.layout import Layout
from ..backbones.parameters import mark
from ..errors import ConfigError, MediaError, UnsupportedShape
from ..kernels.registry import own_precision

POSITIONS = ("learned", "factorised", "none")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL converts to grey


def _pair(config: Any, name: str) -> tuple[int, int]:
    value = getattr(config, name)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"{type(config).__name__}.{name} is {value!r}; it must be a number or (height, width), >= 1")
    return pair


@dataclass(frozen=True, kw_only=True)
class PatchTokenizerConfig:
    """How images become tokens.

    Args:
        dim: width of the tokens.
        patch: pixels of a patch, one number or (height, width).
        channels: of the images.
        size: the image size, one number or (height, width), that positions are learned for. Images of any other size
            are served too: their positions are interpolated.
        positions: "learned", one vector a place; "factorised", one a row plus one a column; "none", for mixers that
            know the order of the tokens by themselves.
        class_token: None; "first"; or "middle" of the grid tokens (Vision Mamba).
        registers: learned tokens at the end of the sequence, scratch space that no head reads.
    """

    dim: int
    patch: int | tuple[int, int] = 16
    channels: int = 3
    size: int | tuple[int, int] = 224
    positions: Literal["learned", "factorised", "none"] = "learned"
    class_token: Literal["first", "middle"] | None = None
    registers: int = 0

    def __post_init__(self) -> None:
        positive(self, "dim", "channels")
        object.__setattr__(self, "patch", _pair(self, "patch"))
        object.__setattr__(self, "size", _pair(self, "size"))
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}")
        if self.class_token not in (None, "first", "middle"):
            raise ConfigError(f"class_token is {self.class_token!r}; it must be 'first', 'middle' or None")
        if self.registers < 0:
            raise ConfigError(f"registers is {self.registers}; it must be at least 0")

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches in an image of `size` (by default the size that positions are learned for)."""
        height, width = size or self.size
        return math.ceil(height / self.patch[0]), math.ceil(width / self.patch[1])


def axis_weights(old: int, new: int, like: Tensor) -> Float[Tensor, "new old"]:
    """The matrix that resizes an axis from `old` to `new` samples: bicubic, antialiased, ends aligned at pixel borders.

    Resizing is linear and separable, so a small matrix product an axis equals `F.interpolate` and, unlike it, has a
    backward that is deterministic on every device.
    """
    basis = torch.eye(old, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(basis[None, None], size=(new, old), mode="bicubic", antialias=True)[0, 0]


def resize_table(table: Tensor, *sizes: int) -> Tensor:
    """A table of vectors with its leading axes resized.

    Args:
        table: `(*old sizes, dim)`.
        sizes: the new size of each axis but the last.
    """
    out = table.to(torch.promote_types(table.dtype, torch.float32))
    for axis, size in enumerate(sizes):
        if out.shape[axis] != size:
            with own_precision(out.device.type):
                weights = axis_weights(out.shape[axis], size, out)
                out = torch.tensordot(weights, out, dims=([1], [axis])).movedim(0, axis)
    return out.to(table.dtype)


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product.

    The weights are a convolution's, so that checkpoints and tools that adapt input channels find what they know.
    """

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        batch, channels, height, width = images.shape
        ph, pw = self.kernel_size
        patches = images.reshape(batch, channels, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, (height // ph) * (width // pw), channels * ph * pw)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchTokenizer(nn.Module):
    """Images to tokens, one a patch, in raster order, with the layout that says where they are.

    Any size and aspect is served: the image is padded with zeros at the bottom and right up to whole patches, and
    positions are interpolated to its grid. The class token, where there is one, is the first of `layout.extra`.
    """

    def __init__(self, config: PatchTokenizerConfig):
        super().__init__()
        self.config = config
        self.proj = PatchProjection(config.channels, config.dim, config.patch, stride=config.patch)
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.proj.bias)
        rows, columns = config.grid()
        learned, factorised = config.positions == "learned", config.positions == "factorised"
        self.positions = self._parameter(rows, columns) if learned else None
        self.row_positions = self._parameter(rows) if factorised else None
        self.column_positions = self._parameter(columns) if factorised else None
        self.class_token = self._parameter(1) if config.class_token else None
        self.registers = self._parameter(config.registers) if config.registers else None

    def _parameter(self, *shape: int) -> nn.Parameter:
        table = torch.empty(*shape, self.config.dim)
        return mark(nn.Parameter(nn.init.trunc_normal_(table, std=0.02)), decay=False)

    def extra(self, grid_tokens: int) -> tuple[int, ...]:
        """Positions of the class token and the registers in a sequence with so many grid tokens."""
        where = {None: (), "first": (0,), "middle": (grid_tokens // 2,)}[self.config.class_token]
        first_register = grid_tokens + len(where)
        return (*where, *range(first_register, first_register + self.config.registers))

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b t d"], Layout]:
        """Tokens and their layout.

        Args:
            images: floating point, normalised as the model was trained.

        Raises:
            UnsupportedShape: an empty image, another number of channels, or integers.
        """
        batch, channels, height, width = images.shape
        if channels != self.config.channels:
            raise UnsupportedShape(
                f"images has {channels} channels, but the tokenizer was built with channels={self.config.channels}"
            )
        if height < 1 or width < 1:
            raise UnsupportedShape(f"images is {height} x {width}; an image needs at least one pixel")
        if not images.is_floating_point():
            raise UnsupportedShape(f"images is {images.dtype}; it must be floating point (load_image gives 0..1)")
        rows, columns = self.config.grid((height, width))
        pad = (0, columns * self.config.patch[1] - width, 0, rows * self.config.patch[0] - height)
        tokens = self.proj(F.pad(images, pad) if any(pad) else images)
        positions = self._positions(rows, columns)
        if positions is not None:
            tokens = tokens + positions.to(tokens.dtype)
        parts = [tokens]
        if self.class_token is not None:
            at = self.extra(rows * columns)[0]
            parts = [tokens[:, :at], self.class_token.to(tokens.dtype).expand(batch, 1, -1), tokens[:, at:]]
        if self.registers is not None:
            parts.append(self.registers.to(tokens.dtype).expand(batch, -1, -1))
        tokens = torch.cat(parts, dim=1) if len(parts) > 1 else tokens
        return tokens, Layout(causal=False, grid=(1, rows, columns), extra=self.extra(rows * columns))

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "t d"] | None:
        if self.positions is not None:
            return resize_table(self.positions, rows, columns).flatten(0, 1)
        if self.row_positions is not None:
            down, across = resize_table(self.row_positions, rows), resize_table(self.column_positions, columns)
            return (down[:, None] + across).flatten(0, 1)
        return None

    @torch.no_grad()
    def resize(self, *, size: int | tuple[int, int] | None = None, patch: int | tuple[int, int] | None = None) -> None:
        """Rebuild the parameters for another image size or patch, keeping what they mean.

        Positions are interpolated. The patch kernel is resized so that its product with a resized patch stays what it
        was, as far as the new patch has room for it (FlexiViT, arXiv 2212.08013, section 3.3).
        """
        old_patch = self.config.patch
        self.config = replace(self.config, size=size or self.config.size, patch=patch or old_patch)
        if self.config.patch != old_patch:
            weight = self.proj.weight
            ways = [
                torch.linalg.pinv(axis_weights(old, new, weight).T)
                for old, new in zip(old_patch, self.config.patch, strict=True)
            ]
            kernel = torch.einsum("Hh,Ww,dchw->dcHW", *ways, weight.to(ways[0].dtype)).to(weight.dtype)
            projection = PatchProjection(
                self.config.channels, self.config.dim, self.config.patch, stride=self.config.patch, device="meta"
            )
            projection.weight, projection.bias = nn.Parameter(kernel), self.proj.bias
            self.proj = projection
        for name, sizes in self._table_sizes().items():
            table = getattr(self, name)
            if table.shape[:-1] != sizes:
                resized = nn.Parameter(resize_table(table, *sizes), requires_grad=table.requires_grad)
                setattr(self, name, mark(resized, decay=False))

    def _table_sizes(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.config.grid()
        sizes = {"positions": (rows, columns), "row_positions": (rows,), "column_positions": (columns,)}
        return {name: size for name, size in sizes.items() if getattr(self, name) is not None}


def fit_positions(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict whose position tables have the sizes of `model`'s, so that weights made at another size load.

    Entries that are no position table of a PatchTokenizer in `model` are passed on as they are.
    """
    fitted = dict(weights)
    for prefix, module in model.named_modules():
        if not isinstance(module, PatchTokenizer):
            continue
        for name, sizes in module._table_sizes().items():
            key = f"{prefix}.{name}" if prefix else name
            table = weights.get(key)
            if table is not None and table.ndim == len(sizes) + 1 and table.shape[:-1] != sizes:
                fitted[key] = resize_table(table, *sizes)
    return fitted


def load_image(source: object, mode: Literal["RGB", "L"] = "RGB") -> Float[Tensor, "c h w"]:
    """An image as a float32 tensor in 0..1.

    Args:
        source: a file (path) in any format that Pillow reads, a PIL image, or a tensor `(c, h, w)` or `(h, w)` with 1
            to 4 channels: uint8, uint16 or floating point (taken to be in 0..1 already).
        mode: "RGB", 3 channels; "L", 1 channel, grey.

    Palettes are expanded, 16-bit images keep their precision, the EXIF orientation is applied, and transparent pixels
    are laid over white.

    Raises:
        MediaError: a missing, unreadable or truncated file; the message names it.
        UnsupportedShape: a tensor of another shape or dtype.
        ConfigError: an unknown mode.
    """
    if mode not in ("RGB", "L"):
        raise ConfigError(f"mode is {mode!r}; it must be 'RGB' or 'L'")
    if isinstance(source, Tensor):
        return _channels(_scale(source), mode)
    from PIL import Image

    if not isinstance(source, str | Path | Image.Image):
        raise UnsupportedShape(f"source is a {type(source).__name__}; it must be a path, a PIL image or a tensor")
    name = source if isinstance(source, str | Path) else getattr(source, "filename", "") or "(a PIL image)"
    try:
        if isinstance(source, Image.Image):
            pixels = _pixels(source)
        else:
            with Image.open(source) as image:
                pixels = _pixels(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read the image {str(name)!r}: {error}") from error
    return _channels(pixels, mode)


def _pixels(image: Any) -> Float[Tensor, "c h w"]:
    import numpy as np
    from PIL import ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        # `convert` would clip these to 255.
        values = torch.from_numpy(np.array(image, dtype=np.float32))
        values = values if image.mode == "F" else values / 65535
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"its values (mode {image.mode}) are outside the range of a 16-bit or 0..1 float image")
        return values[None]
    transparent = image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info
    if transparent:
        image = image.convert("RGBA")
    elif image.mode not in {"RGB", "L"}:
        image = image.convert("L" if image.mode == "1" else "RGB")
    values = torch.from_numpy(np.array(image))
    return _scale(values if values.ndim == 2 else values.permute(2, 0, 1))


def _scale(image: Tensor) -> Float[Tensor, "c h w"]:
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or not 1 <= image.shape[0] <= 4 or 0 in image.shape:
        raise UnsupportedShape(f"source is {tuple(image.shape)}; an image tensor is (c, h, w) with 1 to 4 channels")
    if image.is_floating_point():
        return image.to(torch.float32)
    if image.dtype not in (torch.uint8, torch.uint16):
        raise UnsupportedShape(f"source is {image.dtype}; an image tensor is uint8, uint16 or floating point in 0..1")
    return image.to(torch.float32) / (255 if image.dtype == torch.uint8 else 65535)


def _channels(image: Float[Tensor, "c h w"], mode: str) -> Float[Tensor, "new_c h w"]:
    if image.shape[0] in (2, 4):
        colour, alpha = image[:-1], image[-1:]
        image = colour * alpha + (1 - alpha)
    if mode == "RGB":
        return image.expand(3, -1, -1).contiguous()
    if image.shape[0] == 1:
        return image
    return (image * image.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
