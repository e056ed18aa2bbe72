"""A convolutional stem: images to one token a patch through small convolutions that overlap.

Patches that are cut apart have to be put together again by training, for which little data is not enough. A stack of
3 x 3 convolutions in the place of the patch projection trains faster and to a higher accuracy (arXiv 2106.14881).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# The fewest channels of a convolution: fewer leave matrix products of a CPU half empty.
_NARROWEST = 16


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm, as convolutional stems have it: it keeps how much of a feature an image has.

    With norms over each pixel, or over groups of channels of each image, line drawings are learned at a third of the
    speed. At inference no image depends on another.
    """
    return nn.BatchNorm2d(channels)


class ConvBlock(nn.Module):
    """A residual block of two 3 x 3 convolutions with norms before them (arXiv 1603.05027)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(F.gelu(self.norm2(self.conv1(F.gelu(self.norm1(x))))))


class ConvStem(nn.Module):
    """Images to tokens by halving both sides until a patch is one pixel, with residual blocks at every scale.

    The channels double from scale to scale up to the width of the tokens.

    Args:
        channels: of the images.
        dim: of the tokens.
        patch: pixels that a token stands for; powers of two.
        depth: residual blocks at each scale.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int], depth: int):
        super().__init__()
        scales = max(patch).bit_length() - 1
        layers: list[nn.Module] = []
        for scale in range(scales):
            width = dim if scale == scales - 1 else max(min(_NARROWEST, dim), dim >> (scales - 1 - scale))
            stride = (1 + (patch[0] >> scale > 1), 1 + (patch[1] >> scale > 1))
            layers += [_norm(channels)] if scale else []
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), *(ConvBlock(width) for _ in range(depth))]
            channels = width
        self.layers = nn.Sequential(*layers, _norm(dim))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.proj.weight, std=dim**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Tokens in raster order.

        Args:
            images: both sides are multiples of the patch.
        """
        maps = self.layers(images.contiguous(memory_format=torch.channels_last))
        return self.proj(maps.permute(0, 2, 3, 1).flatten(1, 2))
