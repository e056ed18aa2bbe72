"""Functions on tensors: the few kernels that every mixer stands on. No modules, no configuration."""

from .attention import attention
from .cross_entropy import cross_entropy
from .block_sparse import block_sparse
from .delta_rule import delta_rule
from .gated_linear import gated_linear
from .grouped_mm import grouped_mm
from .long_conv import long_conv
from .norm import norm
from .registry import Case, Draw, Op, explain, get_op, ops, strict, using
from .short_conv import short_conv
from .test_time import test_time

__all__ = [
    "Case",
    "Draw",
    "Op",
    "attention",
    "cross_entropy",
    "block_sparse",
    "delta_rule",
    "explain",
    "gated_linear",
    "get_op",
    "grouped_mm",
    "long_conv",
    "norm",
    "ops",
    "short_conv",
    "strict",
    "test_time",
    "using",
]
