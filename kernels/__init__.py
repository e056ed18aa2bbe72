"""Functions on tensors: the few kernels that every mixer stands on. No modules, no configuration."""

from .attention import attention
from .block_sparse import block_sparse
from .cross_entropy import cross_entropy
from .delta_rule import delta_rule
from .flops import flop_counter
from .gated_linear import gated_linear
from .grouped_mm import grouped_mm
from .linear_recurrence import linear_recurrence
from .long_conv import long_conv
from .mamba2_step import mamba2_step
from .norm import norm
from .registry import Case, Draw, Op, explain, get_op, ops, strict, using
from .rotary import rotary
from .selective_scan import selective_scan
from .short_conv import short_conv
from .test_time import test_time

__all__ = [
    "Case",
    "Draw",
    "Op",
    "attention",
    "block_sparse",
    "cross_entropy",
    "delta_rule",
    "explain",
    "flop_counter",
    "gated_linear",
    "get_op",
    "grouped_mm",
    "linear_recurrence",
    "long_conv",
    "mamba2_step",
    "norm",
    "ops",
    "rotary",
    "selective_scan",
    "short_conv",
    "strict",
    "test_time",
    "using",
]
