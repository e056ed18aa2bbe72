"""Images from files to tensors."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError, MediaError, UnsupportedShape
from ..data.sources import UNNAMED

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL converts to grey


def load_image(source: object, mode: Literal["RGB", "L"] = "RGB", *, name: str | None = None) -> Float[Tensor, "c h w"]:
    """An image as a float32 tensor in 0..1.

    Args:
        source: a file in any format that Pillow reads (its path, its bytes, or opened in binary mode), a PIL image, or
            a tensor `(c, h, w)` or `(h, w)` with 1 to 4 channels: uint8, uint16 or floating point (taken to be in 0..1
            already).
        mode: "RGB", 3 channels; "L", 1 channel, grey.
        name: what messages call the source; a path names itself.

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

    kinds = (str, Path, bytes, Image.Image)
    if not isinstance(source, kinds) and not hasattr(source, "read"):
        raise UnsupportedShape(
            f"source is a {type(source).__name__}; it must be a path, bytes, an open file, a PIL image or a tensor"
        )
    name = name or _name_of(source)
    try:
        if isinstance(source, Image.Image):
            pixels = _pixels(source)
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = _pixels(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read the image {name!r}: {error}") from error
    return _channels(pixels, mode)


def _name_of(source: Any) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return UNNAMED
    return getattr(source, "filename", "") or ("(an open file)" if hasattr(source, "read") else "(a PIL image)")


def _pixels(image: Any) -> Float[Tensor, "c h w"]:
    import numpy as np
    from PIL import ExifTags, ImageOps

    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
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
    values = np.array(image)
    # Planes are copied while they are bytes.
    return _scale(torch.from_numpy(values if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))))


def _scale(image: Tensor) -> Float[Tensor, "c h w"]:
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or not 1 <= image.shape[0] <= 4 or 0 in image.shape:
        raise UnsupportedShape(f"source is {tuple(image.shape)}; an image tensor is (c, h, w) with 1 to 4 channels")
    if image.is_floating_point():
        return image.to(torch.float32)
    if image.dtype not in (torch.uint8, torch.uint16):
        raise UnsupportedShape(f"source is {image.dtype}; an image tensor is uint8, uint16 or floating point in 0..1")
    return image.to(torch.float32).div_(255 if image.dtype == torch.uint8 else 65535)


def _channels(image: Float[Tensor, "c h w"], mode: str) -> Float[Tensor, "new_c h w"]:
    if image.shape[0] in (2, 4):
        colour, alpha = image[:-1], image[-1:]
        image = colour * alpha + (1 - alpha)
    if mode == "RGB":
        return image.expand(3, -1, -1).contiguous()
    if image.shape[0] == 1:
        return image
    return (image * image.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
