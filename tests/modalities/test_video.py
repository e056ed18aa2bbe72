"""Videos of any length and size to tokens, with fewer tokens, and models over them, whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimix.backbones import list_mixers
from omnimix.errors import ConfigError, UnsupportedCall, UnsupportedShape
from omnimix.modalities import (
    AudioClassifier,
    PatchTokenizer,
    PatchTokenizerConfig,
    TubeletTokenizer,
    TubeletTokenizerConfig,
    build_model,
    create_model,
    inflate,
    list_models,
    load_model,
    save_model,
    video_classifier,
)
from omnimix.modalities.common.grid import resize_table
from omnimix.modalities.video.reduction import average_cells, merge_tokens
from omnimix.modalities.video.tokenizer import sinusoids

SMALL = {"dim": 16, "depth": 2, "classes": 3, "size": (4, 16, 16), "tubelet": (2, 8, 8)}


def tokenizer(**options) -> TubeletTokenizer:
    torch.manual_seed(0)
    config = {"dim": 6, "tubelet": (2, 4, 4), "channels": 2, "size": (4, 8, 12)} | options
    return TubeletTokenizer(TubeletTokenizerConfig(**config)).double()


def videos(*size: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Tokens


def test_the_projection_is_a_convolution():
    make, x = tokenizer(positions="none"), videos(4, 8, 12)
    tokens, layout = make(x)
    expected = F.conv3d(x, make.proj.weight, make.proj.bias, stride=(2, 4, 4)).flatten(2).mT
    torch.testing.assert_close(tokens, expected)
    assert layout.grid == (2, 2, 3) and layout.extra == () and layout.causal is False and layout.rows


def test_any_length_and_size_is_filled_up_with_zeros():
    make, x = tokenizer(), videos(3, 5, 9)
    tokens, layout = make(x)
    assert layout.grid == (2, 2, 3)
    torch.testing.assert_close(tokens, make(F.pad(x, (0, 3, 0, 3, 0, 1)))[0])
    for size, grid in (((1, 1, 1), (1, 1, 1)), ((9, 20, 4), (5, 5, 1))):
        tokens, layout = make(videos(*size))
        assert layout.grid == grid
        layout.check(tokens)


def test_positions_are_those_of_the_frame_plus_those_of_the_step():
    make = tokenizer()
    bare = make.proj(videos(4, 8, 12)).unflatten(1, (2, 2, 3))
    with_positions = make(videos(4, 8, 12))[0].unflatten(1, (2, 2, 3))
    expected = make.time_positions[:, None, None] + make.positions
    torch.testing.assert_close(with_positions - bare, expected.expand(2, -1, -1, -1, -1))
    longer = make(videos(10, 12, 12))[0] - make.proj(videos(10, 12, 12))
    expected = resize_table(make.time_positions, 5)[:, None, None] + resize_table(make.positions, 3, 3)
    torch.testing.assert_close(longer[0], expected.flatten(0, 2))


def test_sinusoids_do_not_depend_on_the_length():
    table = sinusoids(50, 7)
    assert torch.equal(table[:20], sinusoids(20, 7)) and torch.equal(table[30:], sinusoids(20, 7, start=30))
    assert torch.equal(table[0], torch.tensor([0.0] * 4 + [1.0] * 3, dtype=torch.float64))
    torch.testing.assert_close(table[3, 0], torch.tensor(3.0, dtype=torch.float64).sin())
    torch.testing.assert_close(table[3, 6], torch.tensor(3.0 * 10_000 ** (-2 / 4), dtype=torch.float64).cos())
    make = tokenizer(causal=True)
    x = videos(8, 8, 12)
    whole, layout = make(x)
    assert layout.causal is True and make.time_positions is None
    torch.testing.assert_close(make(x[:, :, 4:], start=2)[0], whole[:, 2 * 6 :])


@pytest.mark.parametrize("class_token", ["first", "middle"])
def test_tokens_beside_the_grid(class_token):
    make = tokenizer(class_token=class_token, registers=2)
    tokens, layout = make(videos(4, 8, 12))
    at = 0 if class_token == "first" else 6
    assert layout.extra == (at, 13, 14) and tokens.shape == (2, 15, 6)
    torch.testing.assert_close(tokens[:, at], make.class_token.expand(2, -1))
    torch.testing.assert_close(tokens[:, 13:], make.registers.expand(2, -1, -1))


def test_resizing_keeps_what_positions_and_kernels_mean():
    make, x = tokenizer(), videos(8, 16, 12)
    before = make(x)[0]
    make.resize(size=(8, 16, 12))
    assert make.positions.shape == (4, 3, 6) and make.time_positions.shape == (4, 6)
    torch.testing.assert_close(make(x)[0], before)
    # A larger tubelet sees a resized video as the smaller one saw the video itself.
    old = tokenizer(positions="none")
    small = videos(2, 4, 4)
    expected = old(small)[0]
    old.resize(tubelet=(4, 8, 8))
    resized = small
    for axis, side in ((2, 4), (3, 8), (4, 8)):
        resized = resize_table(resized.movedim(axis, 0), side).movedim(0, axis)
    torch.testing.assert_close(old(resized)[0], expected)


def test_a_tokenizer_of_images_is_inflated():
    torch.manual_seed(0)
    for positions in ("learned", "factorised", "none"):
        image = PatchTokenizer(
            PatchTokenizerConfig(dim=6, patch=4, channels=2, size=(8, 12), positions=positions, class_token="middle")
        ).double()
        still = videos(1, 8, 12)
        expected = image(still[:, :, 0])[0]
        mean = inflate(image, frames=6, tubelet=3, inflation="mean")
        torch.testing.assert_close(mean(still.expand(-1, -1, 3, -1, -1))[0], expected)
        central = inflate(image, frames=6, tubelet=3)
        moving = videos(3, 8, 12)
        torch.testing.assert_close(central(moving)[0], image(moving[:, :, 1])[0])
    assert central.config.size == (6, 8, 12) and central.config.positions == "none"


def test_what_is_no_video_is_refused(without_shape_checks):
    make = tokenizer()
    with pytest.raises(UnsupportedShape, match="channels"):
        make(videos(4, 8, 8, channels=3))
    with pytest.raises(UnsupportedShape, match="floating"):
        make(videos(4, 8, 8).long())
    with pytest.raises(UnsupportedShape, match="at least one frame"):
        make(videos(0, 8, 8))
    with pytest.raises(UnsupportedCall, match="causal"):
        make(videos(4, 8, 8), start=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tubelet": (2, 4)}, "tubelet"),
        ({"size": 0}, "size"),
        ({"positions": "learned"}, "positions"),
        ({"time_positions": "rotary"}, "time_positions"),
        ({"class_token": "last"}, "class_token"),
        ({"merge": 0}, "merge"),
        ({"causal": True, "time_positions": "learned"}, "sinusoidal"),
        ({"causal": True, "class_token": "first"}, "class_token"),
        ({"causal": True, "registers": 1}, "registers"),
    ],
    ids=str,
)
def test_options_that_cannot_work(options, match, without_shape_checks):
    with pytest.raises(ConfigError, match=match):
        tokenizer(**options)


def test_an_unknown_inflation_is_named(without_shape_checks):
    with pytest.raises(ConfigError, match="'centre'"):
        inflate(PatchTokenizer(PatchTokenizerConfig(dim=4)), inflation="centre")


# Fewer tokens


def test_cells_are_averaged_in_groups():
    x = torch.randn(2, 4 * 6 * 4, 3, dtype=torch.float64)
    found, grid = average_cells(x, (4, 6, 4), (2, 3, 2))
    expected = F.avg_pool3d(x.unflatten(1, (4, 6, 4)).movedim(-1, 1), (2, 3, 2)).flatten(2).mT
    assert grid == (2, 2, 2)
    torch.testing.assert_close(found, expected)


def test_groups_at_the_end_are_means_of_what_they_have():
    x = torch.randn(1, 3 * 1 * 5, 2, dtype=torch.float64)
    found, grid = average_cells(x, (3, 1, 5), (2, 2, 3))
    cells = x.unflatten(1, (3, 5))[0]
    assert grid == (2, 1, 2)
    expected = [cells[t][:, w].mean((0, 1)) for t in (slice(0, 2), slice(2, 3)) for w in (slice(0, 3), slice(3, 5))]
    torch.testing.assert_close(found[0], torch.stack(expected))


def test_the_most_alike_tokens_are_merged_in_their_place():
    # Two steps of five tokens: in the first the tokens 2 and 3 are alike, in the second 0 and 1.
    e = torch.eye(5, dtype=torch.float64)
    x = torch.cat([e, e])
    x[2], x[6] = 3 * e[3], 2 * e[0]
    found, grid, sizes = merge_tokens(x[None], (2, 1, 5), 4)
    assert grid == (2, 1, 4)
    assert sizes.tolist() == [[1, 1, 2, 1, 2, 1, 1, 1]]
    torch.testing.assert_close(found[0, :4], torch.stack([e[0], e[1], 2 * e[3], e[4]]))
    torch.testing.assert_close(found[0, 4:], torch.stack([1.5 * e[0], e[2], e[3], e[4]]))


@pytest.mark.parametrize("keep", [1, 2, 5, 8, 9, 20])
def test_merged_tokens_are_means_of_all_that_they_stand_for(keep):
    grid, d = (3, 3, 3), 4
    x = torch.randn(2, 27, d, dtype=torch.float64, requires_grad=True)
    found, new, sizes = merge_tokens(x, grid, keep)
    n = min(keep, 9)
    assert new == (3, 1, n) and found.shape == (2, 3 * n, d)
    assert torch.equal(sizes.unflatten(1, (3, n)).sum(-1), torch.full((2, 3), 9))
    weighted = (found * sizes[..., None]).unflatten(1, (3, n)).sum(2)
    torch.testing.assert_close(weighted, x.unflatten(1, (3, 9)).sum(2))
    assert torch.equal(found, merge_tokens(x, grid, keep)[0])
    # Every token has a part in what is left, and every step is its own.
    (gradient,) = torch.autograd.grad(found[:, :n].sum(), x)
    torch.testing.assert_close(gradient[:, :9].sum(1), torch.full((2, d), float(n), dtype=torch.float64))
    assert (gradient[:, :9] != 0).all() and (gradient[:, 9:] == 0).all()
    if keep >= 9:
        torch.testing.assert_close(found, x)


def test_the_same_tokens_are_merged_under_autocast():
    x = torch.randn(2, 147, 32)
    whole = merge_tokens(x, (3, 7, 7), 10)
    with torch.autocast("cpu", torch.bfloat16):
        cast = merge_tokens(x, (3, 7, 7), 10)
    assert torch.equal(whole[0], cast[0]) and torch.equal(whole[2], cast[2])


def test_a_frozen_projection_stays_frozen():
    video = tokenizer()
    video.proj.requires_grad_(False)
    video.resize(tubelet=(1, 2, 2))
    assert not video.proj.weight.requires_grad


def test_reduction_in_the_tokenizer():
    make = tokenizer(group=(1, 2, 1), merge=2, class_token="middle")
    tokens, layout = make(videos(6, 16, 12))
    assert layout.grid == (3, 1, 2) and not layout.rows and layout.extra == (3,)
    layout.check(tokens)
    plain = tokenizer()
    expected = merge_tokens(*average_cells(plain(videos(6, 16, 12))[0], (3, 4, 3), (1, 2, 1)), 2)[0]
    torch.testing.assert_close(tokens[:, [0, 1, 2, 4, 5, 6]], expected)
    with pytest.raises(UnsupportedShape, match="cells"):
        average_cells(tokens, (3, 1, 2), (1, 1, 2))
    with pytest.raises(ConfigError, match="keep"):
        merge_tokens(tokens[:, :6], (3, 1, 2), 0)


# Models


@pytest.mark.parametrize(("size", "millions"), [("tiny", 7), ("small", 26), ("middle", 74)])
def test_published_sizes(size, millions):
    with torch.device("meta"):
        model = create_model(f"videomamba_{size}")
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters / (millions * 1e6) - 1) < 0.05, parameters
    config = model.config
    assert config.video.class_token == "first" and config.head.pool == "class_token" and config.head.classes == 400
    assert (
        config.video.grid() == (8, 14, 14) and config.backbone.scan == "bidirectional" and config.backbone.ffn is None
    )


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_classifies_videos(mixer, without_gradient):
    torch.manual_seed(0)
    model = create_model(f"vivit_tiny_{mixer}_patch16_224", **SMALL)
    # 50 tokens are enough for every part of every mixer; one step and one frame are served too.
    x = torch.randn(2, 3, 4, 40, 40)
    assert model(x[:, :, :1, :8, :12]).shape == (2, 3)
    weights = torch.tensor([1.0, -2.0, 3.0])
    assert not without_gradient(model, lambda model: (model(x) * weights).sum())


def test_a_videomamba_learns_with_all_but_the_decay_before_its_class_token(without_gradient):
    torch.manual_seed(0)
    model = create_model("videomamba_tiny", **SMALL)
    x = torch.randn(2, 3, 4, 20, 16)
    weights = torch.tensor([1.0, -2.0, 3.0])
    # Nothing is before a class token that is first, so in the last block the forward direction has nothing to decay.
    assert without_gradient(model, lambda model: (model(x) * weights).sum()) == [
        "backbone.blocks.1.mixer.branches.0.A_log"
    ]


@pytest.mark.parametrize("options", [{"scan": "cross-3d", "merge": 3}, {"scan": "temporal-first", "group": (1, 2, 2)}])
def test_the_first_token_sees_the_last(options):
    model = build_model(video_classifier(mixer="gla", positions="none", **SMALL | options)).eval()
    x = torch.randn(2, 3, 6, 32, 32, requires_grad=True)
    tokens, _ = model.forward_features(x)
    tokens[0, 0].sum().backward()
    assert x.grad[0, :, -1, -8:, -8:].abs().max() > 0 and x.grad[1].abs().max() == 0


def test_a_saved_model_is_loaded_at_another_size(tmp_path):
    model = create_model("videomamba_tiny", **SMALL).double().eval()
    save_model(model.float(), tmp_path)
    x = torch.randn(2, 3, 6, 32, 24)
    assert torch.equal(load_model(tmp_path)(x), model(x))
    larger = load_model(tmp_path, size=(6, 32, 24))
    assert larger.config.video.size == (6, 32, 24) and larger.tokenizer.positions.shape == (4, 3, 16)
    torch.testing.assert_close(larger(x), model(x))
    model.tokenizer.resize(size=(6, 32, 24))
    assert model.config == larger.config


def test_models_without_a_size_are_loaded_at_none(tmp_path):
    save_model(build_model(AudioClassifier.examples()[0][0]), tmp_path)
    with pytest.raises(ConfigError, match="AudioClassifier"):
        load_model(tmp_path, size=(4, 16, 16))


def test_parts_must_fit():
    assert {"videomamba_tiny", *(f"vivit_tiny_{m}_patch16_224" for m in list_mixers())} <= set(list_models())
    with pytest.raises(ConfigError, match="class_token"):
        video_classifier(mixer="gla", pool="class_token", **SMALL)
    with pytest.raises(ConfigError, match="forward"):
        video_classifier(mixer="gla", causal=True, scan="bidirectional", **SMALL)
    with pytest.raises(UnsupportedCall, match="'columns'.*cross-3d"):
        video_classifier(mixer="gla", merge=2, scan="forward,columns", **SMALL)
