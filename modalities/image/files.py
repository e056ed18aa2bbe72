"""Images from files to tensors."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from ...errors import ConfigError, MediaError, UnsupportedShape
from ..common.values import check_pixels
from ..data.sources import UNNAMED

# Pixels, as of videos. A small file may declare more than any memory holds.
_LARGEST = 1 << 26
# Pixels of a large image that are converted at once.
_BAND = 1 << 22
# How many times a JPEG decoder can halve the sides while it decodes.
_HALVINGS = 3
# What Pillow raises for damaged files; its decoders do not agree on one class.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL converts to grey


def load_image(
    source: Any, mode: Literal["RGB", "L"] = "RGB", *, name: str | None = None, keep_bytes: bool = False
) -> Shaped[Tensor, "c h w"]:
    """Read an image as a float32 tensor in 0..1.

    Args:
        source: a file in any format that Pillow reads (its path, its bytes, or opened in binary mode), a PIL image, or
            a tensor `(c, h, w)` or `(h, w)` with 1 to 4 channels: uint8, uint16 or floating point in 0..1.
        mode: "RGB", 3 channels; "L", 1 channel, grey.
        name: what error messages call the source; by default the path.
        keep_bytes: return uint8 for files and PIL images that are stored so without transparency, which is quicker to
            crop and resize.

    Palettes are expanded, 16-bit images keep their precision, the EXIF orientation is applied (unless the EXIF data are
    damaged), and transparent pixels are laid over white. Integers of 32 bits that do not exceed 255 are taken to be of
    8 bits, and others to be of 16. A JPEG of more than 2^26 pixels is decoded at a half, a quarter or an eighth of its
    size.

    Raises:
        MediaError: a missing, corrupt or truncated file, one of more than 2^26 pixels, or floating-point values that
            are NaN, infinite or far outside of 0..1; the message names it.
        UnsupportedShape: a tensor of another shape or dtype.
        ConfigError: an unknown mode.
    """
    if mode not in ("RGB", "L"):
        raise ConfigError(f"mode is {mode!r}; it must be 'RGB' or 'L'")
    if isinstance(source, Tensor):
        if source.is_floating_point():
            check_pixels(source, name or "the image tensor")
        return _finished(source, mode)
    from PIL import Image

    kinds = (str, Path, bytes, Image.Image)
    if not isinstance(source, kinds) and not hasattr(source, "read"):
        raise UnsupportedShape(
            f"source is a {type(source).__name__}; it must be a path, bytes, an open file, a PIL image or a tensor"
        )
    name = name or _name_of(source)
    try:
        if isinstance(source, Image.Image):
            return _pixels(source, mode, keep_bytes)
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                _bound(image)
                return _pixels(image, mode, keep_bytes)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read the image {name!r}: {error}") from error


def image_header(source: str | Path | bytes) -> tuple[int, int, str]:
    """Height, width and Pillow's mode of an image file, without its pixels.

    Raises:
        MediaError: a missing or corrupt file; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.height, image.width, image.mode
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read the image {_name_of(source)!r}: {error}") from error


def _bound(image: Any) -> None:
    """Decode a large image at a smaller scale, or refuse it, by its header, before anything is allocated."""
    width, height = image.size
    halvings = [h for h in range(_HALVINGS + 1) if -(-width >> h) * -(-height >> h) <= _LARGEST]
    if halvings and halvings[0]:
        # This has an effect on JPEG only.
        image.draft(None, (width >> halvings[0], height >> halvings[0]))
    if image.size[0] * image.size[1] > _LARGEST:
        raise ValueError(f"it has {width} x {height} pixels; at most {_LARGEST:,} are read")


def _name_of(source: Any) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return UNNAMED
    return getattr(source, "filename", "") or ("(an open file)" if hasattr(source, "read") else "(a PIL image)")


def _pixels(image: Any, mode: str, keep_bytes: bool) -> Shaped[Tensor, "c h w"]:
    import numpy as np

    image.load()
    image = _upright(image)
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        # `convert` would clip these to 255.
        values = torch.from_numpy(np.array(image, dtype=np.float32))
        values = values if image.mode == "F" else values / _top(image, values)
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"its values (mode {image.mode}) are outside the range of a 16-bit or 0..1 float image")
        return _finished(values, mode)
    transparent = image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info
    stored = "RGBA" if transparent else "L" if image.mode in {"1", "L"} else "RGB"
    if keep_bytes and not transparent and image.mode != "1":
        planes = _planes(image, mode)
        return planes if mode == "RGB" else planes[None]
    width, height = image.size
    rows = max(1, _BAND // width)
    if rows >= height:
        return _finished(_planes(image, stored), mode)
    # Bands keep a large image out of memory in any form but as it was decoded and as the result.
    result = torch.empty(3 if mode == "RGB" else 1, height, width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        result[:, top : top + rows] = _finished(_planes(band, stored), mode)
    return result


def _planes(image: Any, stored: str) -> UInt8[Tensor, "*c h w"]:
    import numpy as np

    values = np.asarray(image if image.mode == stored else image.convert(stored))
    # Planes are copied while they are bytes.
    return torch.from_numpy(np.array(values if values.ndim == 2 else values.transpose(2, 0, 1), order="C"))


def _top(image: Any, values: Tensor) -> int:
    """The integer that is white. PNG and PGM have 16 bits, also where Pillow reads them as 32."""
    return 255 if image.mode == "I" and image.format not in ("PNG", "PPM") and float(values.max()) <= 255 else 65535


def _upright(image: Any) -> Any:
    from PIL import ExifTags, Image

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        # Damaged metadata says nothing about the pixels.
        return image
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    method = turns.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.format = image.format
    return turned


def _scale(image: Tensor) -> Float[Tensor, "c h w"]:
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or not 1 <= image.shape[0] <= 4 or 0 in image.shape:
        raise UnsupportedShape(f"source is {tuple(image.shape)}; an image tensor is (c, h, w) with 1 to 4 channels")
    if image.is_floating_point():
        return image.to(torch.float32)
    if image.dtype not in (torch.uint8, torch.uint16):
        raise UnsupportedShape(f"source is {image.dtype}; an image tensor is uint8, uint16 or floating point in 0..1")
    return image.to(torch.float32).div_(255 if image.dtype == torch.uint8 else 65535)


def _finished(image: Shaped[Tensor, "*c h w"], mode: str) -> Float[Tensor, "new_c h w"]:
    """The planes of an image in 0..1, composited over white, in the channels of `mode`."""
    image = _scale(image)
    if image.shape[0] in (2, 4):
        colour, alpha = image[:-1], image[-1:]
        image = colour * alpha + (1 - alpha)
    if mode == "RGB":
        return image.expand(3, -1, -1).contiguous()
    if image.shape[0] == 1:
        return image
    return (image * image.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
