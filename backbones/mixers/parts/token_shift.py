"""Token shift: what the token before was (RWKV, arXiv 2305.13048, section 3.1.1)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from ....kernels import short_conv


def token_shift(
    x: Float[Tensor, "b t d"],
    last: Float[Tensor, "n d 1"] | None = None,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n d 1"]]:
    """Give every token the one before it in its sequence.

    Args:
        x: at least one token.
        last: the token before the first one of each sequence; zeros by default.
        cu_seqlens: of packed sequences.

    Returns:
        The tokens before, and the last token of each sequence, which is the next call's `last`.
    """
    # A convolution of two taps whose second is zero.
    taps = x.new_tensor([1.0, 0.0]).expand(x.shape[-1], 2)
    return short_conv(x, taps, initial_state=last, cu_seqlens=cu_seqlens)
