"""The convolutional stem of images."""

import pytest
import torch

from omnimix.errors import ConfigError, UnsupportedCall
from omnimix.modalities import PatchTokenizer, PatchTokenizerConfig
from omnimix.modalities.common.grid import fit_positions
from omnimix.modalities.video.tokenizer import inflate


def tokenizer(**options) -> PatchTokenizer:
    torch.manual_seed(0)
    return PatchTokenizer(PatchTokenizerConfig(**{"dim": 8, "patch": 4, "size": 16, "stem": "conv"} | options)).double()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("patch", [2, 4, 8, (4, 2), (1, 8)])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (3, 2)])
@pytest.mark.parametrize("depth", [0, 2])
def test_the_grid_is_that_of_patches(patch, size, depth):
    net = tokenizer(patch=patch, stem_depth=depth, positions="none")
    tokens, layout = net(image(2, 3, *size))
    patches = PatchTokenizer(PatchTokenizerConfig(dim=8, patch=patch, size=16)).double()
    assert layout.grid == patches(image(2, 3, *size))[1].grid
    layout.check(tokens)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_tokens_depend_on_pixels_around_their_patch_and_lie_where_it_is():
    net = tokenizer(size=32, positions="none", stem_depth=0)
    pixels = image(1, 3, 32, 32).requires_grad_()
    # In training norms look at all pixels.
    net.eval()
    grid = net(pixels)[0].unflatten(1, (8, 8))
    grid[0, 2, 5].sum().backward()
    rows, columns = pixels.grad[0].abs().sum(0).nonzero().T
    assert rows.min() < 8 <= 11 <= rows.max() and columns.min() < 20 <= 23 <= columns.max()
    assert rows.max() - rows.min() < 10 and columns.max() - columns.min() < 10


def test_images_do_not_depend_on_each_other():
    net, images = tokenizer().eval(), image(3, 3, 16, 20)
    torch.testing.assert_close(net(images)[0][1:2], net(images[1:2])[0])


def test_another_image_size_but_no_other_patch():
    small, large = tokenizer(), tokenizer(size=(24, 40))
    large.load_state_dict(fit_positions(small.state_dict(), large))
    small.resize(size=(24, 40))
    small.eval(), large.eval()
    torch.testing.assert_close(large(image(1, 3, 24, 40))[0], small(image(1, 3, 24, 40))[0])
    with pytest.raises(UnsupportedCall, match="strides of the stem"):
        small.resize(patch=8)
    with pytest.raises(ConfigError, match="only 'patch' can be inflated"):
        inflate(small)


@pytest.mark.parametrize("patch", [1, 3, (4, 6)])
def test_patches_that_are_no_powers_of_two_are_refused(patch):
    with pytest.raises(ConfigError, match="powers of two"):
        PatchTokenizerConfig(dim=8, patch=patch, stem="conv")


@pytest.mark.parametrize("dim", [1, 8, 24, 40, 100])
def test_any_width(dim):
    assert tokenizer(dim=dim)(image(2, 3, 16, 16))[0].shape == (2, 16, dim)
