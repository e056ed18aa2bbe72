"""Images as they are met: damaged EXIF data, extreme shapes, sizes that fill the memory, values that no image has."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from omnimix.errors import MediaError
from omnimix.modalities import load_image
from omnimix.modalities.image import files
from omnimix.modalities.image.squares import resized_square
from omnimix.recipes.video.preprocess import ClipConfig, VideoPreprocess
from omnimix.recipes.vision.data import TensorData
from omnimix.recipes.vision.preprocess import ImagePreprocess

from .media_mutations import peak_of


@pytest.fixture
def photo() -> np.ndarray:
    rows, columns = np.mgrid[0:12, 0:20]
    return np.stack([rows * 20, columns * 12, (rows + columns) * 8], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(("suffix", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(photo, suffix, options, orientation):
    data = encoded(Image.fromarray(photo), suffix, exif=turned(orientation), **options)
    upright = torch.from_numpy(photo).permute(2, 0, 1) / 255
    shown = {
        1: upright,
        2: upright.flip(2),
        3: upright.flip(1, 2),
        4: upright.flip(1),
        5: upright.mT,
        6: upright.rot90(-1, (1, 2)),
        7: upright.flip(1, 2).mT,
        8: upright.rot90(1, (1, 2)),
    }[orientation]
    torch.testing.assert_close(load_image(data), shown)


@pytest.mark.parametrize(("suffix", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
@pytest.mark.parametrize(
    "damage", [b"", b"II", b"Exif\x00\x00", b"MM\x00*\x00\x00\xff\xff", b"II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"]
)
def test_damaged_exif_leaves_the_pixels_readable(photo, suffix, options, damage):
    exif = damage if suffix == "PNG" else b"Exif\x00\x00" + damage
    data = encoded(Image.fromarray(photo), suffix, exif=exif, **options)
    upright = torch.from_numpy(photo).permute(2, 0, 1) / 255
    assert (load_image(data) - upright).abs().mean() < (0.02 if suffix == "JPEG" else 1e-6)


@pytest.mark.parametrize(("top", "white"), [(255, 255), (256, 65535), (65535, 65535)])
def test_integers_of_32_bits(top, white):
    values = np.linspace(0, top, 240).round().astype(np.int32).reshape(12, 20)
    data = encoded(Image.fromarray(values, mode="I"), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I"
    torch.testing.assert_close(load_image(data, "L")[0], torch.from_numpy(values).float() / white)


def test_dark_images_of_16_bits_stay_dark():
    values = np.full((4, 5), 200, np.uint16)
    header = b"P5 5 4 65535\n"
    assert float(load_image(header + values.byteswap().tobytes(), "L").max()) == pytest.approx(200 / 65535)
    assert float(load_image(encoded(Image.fromarray(values), "PNG"), "L").max()) == pytest.approx(200 / 65535)


def png(width: int, height: int) -> bytes:
    """A black image whose file is as small as its rows compress."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_more_pixels_than_are_read_are_refused_by_the_header():
    gif = bytearray(encoded(Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 13000, 13000)
    bmp = bytearray(encoded(Image.new("L", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 9000, 9000)
    for data in (bytes(gif), bytes(bmp), png(9000, 9000)[:200]):

        def refused(data=data):
            with pytest.raises(MediaError, match=r"member 7.*(13000 x 13000|9000 x 9000) pixels; at most 67,108,864"):
                load_image(data, name="member 7")

        assert peak_of(refused) < 20 * 2**20
    assert load_image(png(8192, 8)).shape == (3, 8, 8192)


def test_large_jpegs_are_decoded_at_a_smaller_scale(monkeypatch):
    rows, columns = np.mgrid[0:200, 0:320]
    smooth = np.stack([rows, columns // 2, (rows + columns) // 3], axis=-1).astype(np.uint8)
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95, exif=turned(6))
    whole = load_image(data)
    for limit, size in ((64_000, (320, 200)), (63_999, (160, 100)), (4_000, (80, 50)), (1_000, (40, 25))):
        monkeypatch.setattr(files, "_LARGEST", limit)
        found = load_image(data)
        assert found.shape == (3, *size)
        assert (found - tv.resize(whole, list(size), antialias=True)).abs().mean() < 0.02
    monkeypatch.setattr(files, "_LARGEST", 999)
    with pytest.raises(MediaError, match="320 x 200"):
        load_image(data)


IMAGE = ImagePreprocess(classes=("a",), size=64, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.9)
VIDEO = VideoPreprocess(classes=("a",), **vars(ClipConfig(size=64)), mean=(0.0,) * 3, std=(1.0,) * 3, seconds=1.0)


@pytest.mark.parametrize("size", [(8000, 2), (60000, 1), (1, 60000)])
def test_extreme_shapes_do_not_take_the_memory(size):
    data = png(*size)
    for _ in range(2):  # imports count at the first time
        peak = peak_of(lambda: IMAGE.load(data))
    assert peak < 64 * 2**20
    assert IMAGE.load(data).shape == (3, 64, 64)
    frames = torch.zeros(2, 3, *size, dtype=torch.uint8)
    assert peak_of(lambda: VIDEO.squares(frames, 3)) < 64 * 2**20


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "size", "shorter", "bound"),
    [
        ((60, 80), 32, 36, 0.0),
        ((40, 400), 16, 18, 1e-4),
        ((400, 40), 16, 18, 1e-4),
        ((3, 300), 8, 9, 1e-4),
        ((64, 64), 16, 320, 1e-4),
        ((33, 1000), 16, 320, 5e-3),
    ],
)
def test_squares_are_those_of_the_whole_resized_image(shape, size, shorter, bound, place):
    image = torch.rand(1, *shape)
    whole = tv.resize(image, [shorter], antialias=True)
    height, width = whole.shape[1:]
    top = round((height - size) * (place if shape[0] > shape[1] else 0.5))
    left = round((width - size) * (place if shape[1] > shape[0] else 0.5))
    expected = whole[:, top : top + size, left : left + size]
    torch.testing.assert_close(resized_square(image, size, shorter, place), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e29, 255.0, -1.0])
def test_values_that_no_picture_has(value):
    image = torch.rand(3, 8, 8)
    image[1, 2, 3] = value
    for refused in (
        lambda: load_image(image, name="sample 7"),
        lambda: load_image(encoded(Image.fromarray(image[1].numpy()), "TIFF"), name="sample 7"),
    ):
        with pytest.raises(MediaError, match="sample 7"):
            refused()
    with pytest.raises(MediaError, match="video tensor.*divide"):
        VIDEO.squares(torch.stack([image, image]))
    labels = torch.arange(2)
    tables = {f"{split}_images": torch.rand(2, 3, 8, 8) for split in ("train", "val")}
    tables |= {f"{split}_labels": labels for split in ("train", "val")}
    TensorData(tensors=dict(tables))
    tables["val_images"][1] = image
    with pytest.raises(MediaError, match="val_images"):
        TensorData(tensors=tables)


def test_pictures_that_filters_overshot_are_taken():
    image = torch.rand(3, 8, 8) * 1.4 - 0.2
    assert torch.equal(load_image(image), image)
    frames = torch.stack([image, image])
    torch.testing.assert_close(VIDEO.tinted(frames), frames)


@pytest.mark.parametrize("form", ["L", "RGB", "RGBA", "P", "LA", "1", "CMYK"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_bands_of_large_images_are_those_of_the_whole(photo, form, mode, monkeypatch):
    image = Image.fromarray(photo).convert(form)
    if form == "P":
        image.info["transparency"] = 3
    elif form in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(photo[..., 0]))
    whole = load_image(image, mode)
    for pixels in (1, 60, 7 * 20):
        monkeypatch.setattr(files, "_BAND", pixels)
        assert torch.equal(load_image(image, mode), whole)
