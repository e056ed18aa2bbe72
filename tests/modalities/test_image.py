"""Images to tensors, tensors to tokens."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from omnimix.backbones import Layout
from omnimix.backbones.heads import ClassificationHead, ClassificationHeadConfig
from omnimix.errors import ConfigError, MediaError, UnsupportedCall, UnsupportedShape
from omnimix.modalities import PatchTokenizer, PatchTokenizerConfig, load_image
from omnimix.modalities.common.grid import fit_positions, resize_table


def tokenizer(**options) -> PatchTokenizer:
    torch.manual_seed(0)
    return PatchTokenizer(PatchTokenizerConfig(**{"dim": 8, "patch": 4, "size": 16} | options)).double()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# The tokenizer


def test_patches_are_a_convolution():
    net = tokenizer(positions="none", patch=(4, 2))
    x = image(2, 3, 12, 10)
    tokens, layout = net(x)
    expected = F.conv2d(x, net.proj.weight, net.proj.bias, stride=(4, 2)).flatten(2).mT
    torch.testing.assert_close(tokens, expected)
    assert layout.grid == (1, 3, 5) and layout.causal is False and layout.extra == ()


@pytest.mark.parametrize("positions", ["learned", "factorised", "none"])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (17, 30), (64, 8), (5, 90)])
@pytest.mark.parametrize("class_token", [None, "first", "middle"])
def test_any_size(positions, size, class_token):
    net = tokenizer(positions=positions, class_token=class_token, registers=2)
    tokens, layout = net(image(2, 3, *size))
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert layout.grid == (1, rows, columns)
    layout.check(tokens)
    if class_token:
        at = {"first": 0, "middle": rows * columns // 2}[class_token]
        assert layout.extra[0] == at
        torch.testing.assert_close(tokens[0, at], net.class_token[0])
    torch.testing.assert_close(tokens[1, -2:], net.registers)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_padding_is_zeros_at_the_bottom_and_right():
    net = tokenizer()
    x = image(1, 3, 10, 13)
    tokens, _ = net(x)
    padded, _ = net(F.pad(x, (0, 3, 0, 2)))
    assert torch.equal(tokens, padded)


@pytest.mark.parametrize("sizes", [(9, 4), (3, 11), (5, 7), (1, 1), (30, 2)])
def test_resized_positions_equal_interpolate(sizes):
    table = image(5, 7, 3)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=sizes, mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_table(table, *sizes), expected[0].permute(1, 2, 0))


def test_resized_positions_keep_their_precision_under_autocast():
    table = image(5, 7, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = resize_table(table, 9, 4)
        assert tokenizer().float()(image(1, 3, 9, 23).float())[0].isfinite().all()
    assert torch.equal(inside, resize_table(table, 9, 4))


def test_shapes_on_the_meta_device():
    tokens, layout = tokenizer().to("meta")(image(1, 3, 9, 23).to("meta"))
    assert tokens.shape == (1, 18, 8) and layout.grid == (1, 3, 6)


def test_positions_say_where_the_patch_is():
    net = tokenizer(size=(16, 24))
    tokens, _ = net(torch.zeros(1, 3, 16, 24, dtype=torch.float64))
    torch.testing.assert_close(tokens[0], net.positions.flatten(0, 1))
    factorised = tokenizer(size=(16, 24), positions="factorised")
    tokens, _ = factorised(torch.zeros(1, 3, 16, 24, dtype=torch.float64))
    torch.testing.assert_close(
        tokens.view(4, 6, -1)[2, 5], factorised.row_positions[2] + factorised.column_positions[5]
    )


@pytest.mark.parametrize("positions", ["learned", "factorised"])
def test_weights_of_another_size_load(positions):
    small, large = tokenizer(positions=positions), tokenizer(positions=positions, size=(24, 40))
    x = image(1, 3, 24, 40)
    large.load_state_dict(fit_positions(small.state_dict(), large))
    torch.testing.assert_close(large(x)[0], small(x)[0])
    small.resize(size=(24, 40))
    torch.testing.assert_close(small.state_dict(), large.state_dict())
    assert small.config == large.config


def test_resized_patches_see_the_same_in_a_resized_image():
    net = tokenizer(positions="none")
    x = image(1, 3, 16, 16)
    before, _ = net(x)
    net.resize(patch=8)
    # Every patch enlarged by itself, as the resized kernel assumes.
    patches = F.unfold(x, 4, stride=4).mT.reshape(16, 3, 4, 4)
    large = F.interpolate(patches, size=(8, 8), mode="bicubic", antialias=True)
    after = torch.cat([net(patch[None])[0] for patch in large], dim=1)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\) is not \(b, c, h, w\)"),
        (torch.zeros(1, 4, 8, 8), "4 channels"),
        (torch.zeros(1, 3, 0, 8), "0 x 8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_images_that_cannot_be_served(without_shape_checks, x, words):
    with pytest.raises(UnsupportedShape, match=words):
        tokenizer()(x)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"patch": 0},
        {"patch": (4, 4, 4)},
        {"size": (0, 4)},
        {"channels": 0},
        {"positions": "rotary"},
        {"class_token": "last"},
        {"registers": -1},
    ],
)
def test_configurations_that_cannot_be(without_shape_checks, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PatchTokenizerConfig(**{"dim": 8} | options)


# The head


@pytest.mark.parametrize("class_token", [None, "first", "middle"])
def test_the_mean_is_of_grid_tokens_only(class_token):
    net = tokenizer(class_token=class_token, registers=1)
    tokens, layout = net(image(2, 3, 12, 20))
    head = ClassificationHead(8, ClassificationHeadConfig(classes=0)).double()
    on_grid = [i for i in range(tokens.shape[1]) if i not in layout.extra]
    assert len(on_grid) == 15
    torch.testing.assert_close(head(tokens, layout), tokens[:, on_grid].mean(1))
    for pool, expected in {"max": tokens[:, on_grid].amax(1), "none": tokens}.items():
        head = ClassificationHead(8, ClassificationHeadConfig(classes=0, pool=pool))
        torch.testing.assert_close(head(tokens, layout), expected)


def test_the_class_token_is_pooled():
    net = tokenizer(class_token="middle", registers=1)
    tokens, layout = net(image(2, 3, 12, 20))
    head = ClassificationHead(8, ClassificationHeadConfig(classes=5, pool="class_token")).double()
    torch.testing.assert_close(head(tokens, layout), head.classifier(tokens[:, 7]))
    with pytest.raises(UnsupportedCall, match="class token"):
        head(tokens[:, :15], Layout(causal=False, grid=(1, 3, 5)))


def test_head_options(without_shape_checks):
    for options in ({"classes": -1}, {"pool": "min"}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ClassificationHeadConfig(**options)


# Files


@pytest.fixture
def photo() -> np.ndarray:
    rows, columns = np.mgrid[0:12, 0:20]
    return np.stack([rows * 20, columns * 12, (rows + columns) * 8], axis=-1).astype(np.uint8)


def expected(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats(tmp_path, photo, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(photo).save(path, **({"lossless": True} if suffix == "webp" else {}))
    for source in (path, str(path), Image.open(path), torch.from_numpy(photo).permute(2, 0, 1)):
        loaded = load_image(source)
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, expected(photo))


def test_jpeg_and_its_orientation(tmp_path, photo):
    upright, turned = tmp_path / "upright.jpg", tmp_path / "turned.jpg"
    Image.fromarray(photo).save(upright, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(photo).save(turned, quality=95, exif=exif)
    assert (load_image(upright) - expected(photo)).abs().mean() < 0.02
    torch.testing.assert_close(load_image(turned), load_image(upright).rot90(-1, dims=(1, 2)))


def test_kinds_of_pixels(tmp_path, photo):
    colour = Image.fromarray(photo)
    grey = colour.convert("L")
    grey.save(tmp_path / "grey.png")
    one = torch.from_numpy(np.array(grey)).float()[None] / 255
    torch.testing.assert_close(load_image(tmp_path / "grey.png"), one.expand(3, -1, -1))
    torch.testing.assert_close(load_image(tmp_path / "grey.png", mode="L"), one)
    torch.testing.assert_close(load_image(colour, mode="L"), one, atol=1 / 255, rtol=0)

    palette = colour.quantize(16)
    palette.save(tmp_path / "palette.gif")
    torch.testing.assert_close(load_image(tmp_path / "palette.gif"), expected(np.array(palette.convert("RGB"))))

    deep = (np.arange(240, dtype=np.uint16) * 273).reshape(12, 20)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    exact = torch.from_numpy(deep.astype(np.float32))[None] / 65535
    torch.testing.assert_close(load_image(tmp_path / "deep.png", mode="L"), exact)
    torch.testing.assert_close(load_image(torch.from_numpy(deep), mode="L"), exact)

    bilevel = Image.fromarray(photo[..., 0] > 100)
    torch.testing.assert_close(load_image(bilevel, mode="L")[0], torch.from_numpy(photo[..., 0] > 100).float())


def test_transparent_pixels_lie_over_white(tmp_path, photo):
    alpha = np.full((12, 20, 1), 255, np.uint8)
    alpha[:, 10:] = 0
    Image.fromarray(np.concatenate([photo, alpha], axis=-1)).save(tmp_path / "cut.png")
    loaded = load_image(tmp_path / "cut.png")
    torch.testing.assert_close(loaded[:, :, :10], expected(photo)[:, :, :10])
    assert (loaded[:, :, 10:] == 1).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_truncated_files(tmp_path, photo, suffix):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"half.{suffix}"
    Image.fromarray(photo.repeat(8, 0).repeat(8, 1)).save(whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MediaError, match=f"half.{suffix}"):
        load_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"this is a letter, not a picture\n", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"]
)
def test_files_that_are_no_images(tmp_path, content):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    with pytest.raises(MediaError, match="odd.jpg"):
        load_image(path)


def test_images_out_of_shards(tmp_path):
    Image.new("RGB", (5, 4), (255, 0, 51)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    expected = torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 4, 5)
    torch.testing.assert_close(load_image(data), expected)
    torch.testing.assert_close(load_image(io.BytesIO(data)), expected)
    with pytest.raises(MediaError, match="member 7"):
        load_image(data[:40], name="member 7")
    with pytest.raises(MediaError, match="bytes"):
        load_image(b"")


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(MediaError, match=path.name):
            load_image(path)


def test_damaged_bytes_give_an_image_or_a_media_error(tmp_path, photo):
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    outcomes = []
    for suffix in ("jpeg", "png", "ppm"):
        Image.fromarray(photo).save(path, suffix)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[random.integers(0, len(whole), 6)] = random.integers(0, 256, 6)
            path.write_bytes(broken.tobytes())
            try:
                outcomes.append(load_image(path).shape[0] == 3)
            except MediaError:
                outcomes.append(False)
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (torch.zeros(5, 4, 4), r"\(5, 4, 4\)"),
        (torch.zeros(3, 0, 4), r"\(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (7, "a int"),
    ],
)
def test_sources_that_are_no_images(without_shape_checks, source, words):
    with pytest.raises(UnsupportedShape, match=words):
        load_image(source)
    with pytest.raises(ConfigError, match="mode"):
        load_image(torch.zeros(3, 4, 4), mode="BGR")


def test_importing_the_modalities_costs_no_heavy_package():
    heavy = "{'torchvision', 'torchaudio', 'timm', 'lightning', 'PIL', 'av', 'transformers'}"
    code = f"import sys, omnimix.modalities as m; m.list_models(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
