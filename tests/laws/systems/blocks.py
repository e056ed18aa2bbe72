"""Image tokens that see each other inside causal text, by block numbers (PaliGemma, arXiv 2407.07726)."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimix.backbones import Backbone, BackboneConfig, Layout

from . import System

# Two tokens of text, an image of four, and text.
NUMBERS = (0, 1, 2, 2, 2, 2, 3, 4, 5)


def numbers(x: Tensor) -> Layout:
    return Layout(causal="block", block=torch.tensor(NUMBERS[: x.shape[1]]).expand(len(x), -1))


def a_token_sees_its_block_and_earlier_ones(net: Backbone) -> None:
    x = torch.randn(1, 9, net.config.dim, dtype=torch.float64, requires_grad=True)
    y = net(x, numbers(x)).y
    seen = torch.stack(
        [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].abs().amax(-1)[0] > 0 for i in range(9)]
    )
    block = torch.tensor(NUMBERS)
    assert torch.equal(seen, block[None] <= block[:, None])


def text_after_the_image_resumes(net: Backbone) -> None:
    x = torch.randn(2, 9, net.config.dim, dtype=torch.float64)
    whole, first = net(x, numbers(x)), net(x[:, :6], numbers(x[:, :6]))
    rest = net(x[:, 6:], Layout(causal="block", block=torch.tensor([[3, 4, 5]] * 2)), first.state)
    assert torch.allclose(torch.cat([first.y, rest.y], 1), whole.y, atol=1e-10)


def blocks_of_one_size_have_numbers(net: Backbone) -> None:
    x = torch.randn(2, 9, net.config.dim, dtype=torch.float64)
    numbered = net(x, Layout(causal="block", block=(torch.arange(9) // 4).expand(2, -1)))
    assert torch.allclose(numbered.y, net(x, Layout(causal="block", block=4)).y, atol=1e-10)


def packed_rows_keep_their_numbers(net: Backbone) -> None:
    x = torch.randn(1, 15, net.config.dim, dtype=torch.float64)
    block = torch.tensor([*NUMBERS, *NUMBERS[:6]])[None]
    packed = net(x, Layout(causal="block", block=block, cu_seqlens=torch.tensor([0, 9, 15]))).y
    for row, own in zip(x.split([9, 6], 1), packed.split([9, 6], 1), strict=True):
        assert torch.allclose(net(row, numbers(row)).y, own, atol=1e-10)


CHECKS = (
    a_token_sees_its_block_and_earlier_ones,
    text_after_the_image_resumes,
    blocks_of_one_size_have_numbers,
    packed_rows_keep_their_numbers,
)

SYSTEMS = {
    f"image_in_text_{mixer}": System(
        config=BackboneConfig(dim=16, depth=2, pattern=(mixer,), scan="bidirectional"), layout=numbers, checks=CHECKS
    )
    for mixer in ("attention", "linear", "mamba2")
}
