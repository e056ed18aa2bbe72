"""Shared parts of grid tokenizers: position tables of any size, strided projections, extra tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones.config import not_negative
from ...backbones.parameters import mark
from ...errors import ConfigError
from ...utils.modes import own_precision

# The most pixels or frames along an axis.
LONGEST = 1 << 16


def sizes(config: Any, name: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    """A field of `config` as one number per axis; a single number stands for all of them.

    Raises:
        ConfigError: a wrong count of numbers, or one below 1.
    """
    value = getattr(config, name)
    found = (value,) * len(axes) if isinstance(value, int) else tuple(value)
    if len(found) != len(axes) or not all(1 <= each <= LONGEST for each in found):
        raise ConfigError(
            f"{type(config).__name__}.{name} is {value!r}; it must be a number or ({', '.join(axes)}), 1 to {LONGEST}"
        )
    return found


def axis_weights(old: int, new: int, like: Tensor) -> Float[Tensor, "new old"]:
    """The matrix that resizes an axis from `old` to `new` samples: bicubic, antialiased, `align_corners=False`.

    Resizing is linear and separable, so one small matrix product per axis equals `F.interpolate` and, unlike it, has a
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
                out = _along(axis, weights, out)
    return out.to(table.dtype)


def _along(axis: int, matrix: Float[Tensor, "new old"], values: Tensor) -> Tensor:
    """The products of a matrix with the vectors along an axis."""
    # The annotation of `dims` leaves out that it may name axes.
    dims: Any = ([1], [axis])
    return torch.tensordot(matrix, values, dims=dims).movedim(0, axis)


def resize_kernel(weight: Float[Tensor, "d c *old"], *sizes: int) -> Float[Tensor, "d c *new"]:
    """The weights of a projection for patches of another size.

    The product of the new kernel with a resized patch stays the same, as far as the new patch can represent it
    (FlexiViT, arXiv 2212.08013, section 3.3).
    """
    out = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis, size in enumerate(sizes, start=2):
        if out.shape[axis] != size:
            way = torch.linalg.pinv(axis_weights(out.shape[axis], size, out).T)
            out = _along(axis, way, out)
    return out.to(weight.dtype).contiguous()


def pad_to_whole(media: Float[Tensor, "b c *sizes"], kernel: tuple[int, ...]) -> Float[Tensor, "b c *padded"]:
    """Zeros at the end of every axis, up to a multiple of the kernel's side."""
    pairs = [(0, -size % side) for size, side in zip(media.shape[2:], kernel, strict=True)]
    pad = [n for pair in reversed(pairs) for n in pair]
    return F.pad(media, pad) if any(pad) else media


def strided_product(
    media: Float[Tensor, "b c *sizes"], weight: Float[Tensor, "d c *kernel"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b t d"]:
    """A convolution whose stride is its kernel, in raster order, as one matrix product."""
    batch, channels, *extent = media.shape
    sides = weight.shape[2:]
    axes = len(sides)
    split = [n for size, side in zip(extent, sides, strict=True) for n in (size // side, side)]
    order = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    patches = media.reshape(batch, channels, *split).permute(order)
    patches = patches.reshape(batch, prod(split[::2]), channels * prod(sides))
    return F.linear(patches, weight.flatten(1), bias)


class GridTokenizer(nn.Module, ABC):
    """A tokenizer of grid tokens, and of a class token and registers outside the grid.

    `config` has the fields `dim`, `class_token` (None, "first" or "middle") and `registers`.
    """

    config: Any

    def _table(self, *shape: int) -> nn.Parameter:
        table = torch.empty(*shape, self.config.dim)
        return nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def _make_extra(self) -> None:
        self.class_token = self._table(1) if self.config.class_token else None
        self.registers = self._table(self.config.registers) if self.config.registers else None
        mark(self, "class_token", "registers", *self._all_tables(), decay=False)

    def extra(self, grid_tokens: int) -> tuple[int, ...]:
        """Indices of the class token and the registers in a sequence with `grid_tokens` grid tokens."""
        where = {None: (), "first": (0,), "middle": (grid_tokens // 2,)}[self.config.class_token]
        first_register = grid_tokens + len(where)
        return (*where, *range(first_register, first_register + self.config.registers))

    def _with_extra(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b all d"]:
        parts = [tokens]
        if self.class_token is not None:
            at = self.extra(tokens.shape[1])[0]
            token = self.class_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
            parts = [tokens[:, :at], token, tokens[:, at:]]
        if self.registers is not None:
            parts.append(self.registers.to(tokens.dtype).expand(tokens.shape[0], -1, -1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else tokens

    @abstractmethod
    def _all_tables(self) -> dict[str, tuple[int, ...]]:
        """The size of each position table by name, as `config` sets it, for tables that are None too."""

    def table_sizes(self) -> dict[str, tuple[int, ...]]:
        """The leading sizes of each existing position table, by name."""
        return {name: size for name, size in self._all_tables().items() if getattr(self, name) is not None}

    def _resize_tables(self) -> None:
        for name, size in self.table_sizes().items():
            table = getattr(self, name)
            if table.shape[:-1] != size:
                setattr(self, name, nn.Parameter(resize_table(table, *size), requires_grad=table.requires_grad))


def check_extra(config: Any) -> None:
    """Raise ConfigError where `class_token` or `registers` of `config` is invalid."""
    if config.class_token not in (None, "first", "middle"):
        raise ConfigError(f"class_token is {config.class_token!r}; it must be 'first', 'middle' or None")
    not_negative(config, "registers")


def fit_positions(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict whose position tables have the sizes of `model`'s, so that weights made at another size load.

    Other entries are returned unchanged.
    """
    fitted = dict(weights)
    for prefix, module in model.named_modules():
        if not isinstance(module, GridTokenizer):
            continue
        for name, size in module.table_sizes().items():
            key = f"{prefix}.{name}" if prefix else name
            table = weights.get(key)
            if table is not None and table.ndim == len(size) + 1 and table.shape[:-1] != size:
                fitted[key] = resize_table(table, *size)
    return fitted
