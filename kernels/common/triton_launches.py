"""Launches of the kernels in `triton_chunks`, with what the launches of one call share."""

import torch
import triton
from torch import Tensor

from .tools import accumulate_dtype, chunk_table, dot_mode, grid, interpreting, tile, unit_stride
from .triton_chunks import (
    BLOCK,
    CHANNEL,
    NONE,
    SCALAR,
    _block_score_kernel,
    _gradient_kernel,
    _output_kernel,
    _score_kernel,
    _state_kernel,
    _wide_state_kernel,
)

# Channels of keys that a program of the state kernel can hold, as it must where the values depend on the state.
WIDEST = 128


def largest(dtype: torch.dtype) -> int:
    """The largest tile, and chunk, for inputs of this dtype."""
    # With float32 operands, which float16 needs for their range, half as much fits registers and AMD's shared memory.
    return 64 if dtype == torch.bfloat16 or interpreting() else 32


def chunking(v: Tensor, cu_seqlens: Tensor | None, most: int) -> tuple[int, int, int, int]:
    """Steps in a chunk (at most `most`), chunks in a sequence of full length, sequences, chunks in all.

    The sizes may be symbolic.
    """
    batch, length = v.shape[:2]
    size = 16 if length <= 16 else 32 if length <= 32 else most
    chunks = (length + size - 1) // size
    if cu_seqlens is None:
        return size, chunks, batch, batch * chunks
    sequences = cu_seqlens.shape[0] - 1
    return size, chunks, sequences, length // size + sequences


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what only dots read: that in which they read it."""
    return dtype if dtype == torch.bfloat16 and not interpreting() else accumulate_dtype(dtype)


def strides(x: Tensor | None, heads: int) -> tuple[int, int, int, int]:
    """Of batch, step and head of (b, t, g, n), and how many heads share one of x's."""
    return (0, 0, 0, 1) if x is None else (*x.stride()[:3], heads // x.shape[2])


class Chunks:
    """The launches of one call, and what they share: how the steps are cut into chunks, tiles, the kernels' modes.

    The tensors that the methods take have neighbouring elements in their last dimension (`unit_stride`), and as many
    heads as v or a number that divides it.

    Args:
        v: the values, (b, t, h, v).
        width: of the keys.
        decay: None, (b, t, h) or (b, t, h, k).
        cu_seqlens: of packed sequences.
        most: steps in a chunk, at most.
    """

    def __init__(self, v: Tensor, width: int, decay: Tensor | None, cu_seqlens: Tensor | None, most: int):
        self.v, self.width = v, width
        self.form, self.decay = NONE.value, None
        if decay is not None:
            self.form = (SCALAR if decay.dim() == 3 else CHANNEL).value
            self.decay = decay if decay.dim() == 3 else unit_stride(decay)
        self.batch, self.length, self.heads, self.width_v = v.shape
        self.size, self.chunks, self.sequences, self.rows = chunking(v, cu_seqlens, most)
        self.table = self.first = self.bounds = None
        if cu_seqlens is not None:
            self.table, self.first = chunk_table(cu_seqlens, self.size, self.length)
            # The table's last rows name a sequence after the last one, which ends where it starts.
            self.bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])
        self.dtype = accumulate_dtype(v.dtype)
        self.stored = stored(v.dtype)
        self.bv = tile(self.width_v, largest(v.dtype))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.v.new_empty(shape, dtype=dtype or self.dtype)

    def tile(self, width: int, form: int) -> int:
        """Columns of keys in a tile."""
        # A decay per channel is a tile of its own, with its sums: narrower, they stay in registers.
        return tile(width, 32 if form == CHANNEL.value else largest(self.v.dtype))

    def common(self, width: int, form: int, scale: float = 1.0, exclusive: bool = False) -> dict[str, object]:
        """The arguments that the kernels share."""
        return {
            "d_strides": (0, 0, 0) if form == NONE.value else self.decay.stride()[:3],
            "length": self.length, "chunks": self.chunks, "bounds": self.bounds, "H": self.heads, "K": width,
            "scale": scale, "C": self.size, "DECAY": form, "MODE": dot_mode(self.v.dtype, wide=True),
            "PACKED": self.table is not None, "EXCLUSIVE": int(exclusive), "BK": self.tile(width, form),
        }  # fmt: skip

    def states(
        self, x: Tensor, y: Tensor | None, initial: Tensor | None, scale: float = 1.0, *, exclusive: bool = False,
        reverse: bool = False, more: Tensor | None = None, values: Tensor | None = None,
        weights: Tensor | None = None, base: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The state at each chunk, (rows, h, k, v), and after the last, (n, h, k, v).

        Args:
            x, y: what is written, scale * xᵀ y; y may be None where there are weights.
            initial: the state, or gradient, to start with.
            exclusive: whether x reads before the step's decay; only in reverse.
            more, values: written too; in reverse `more` is exclusive.
            weights, base: the values are then weights @ state + base, and written to `values`.
        """
        shape = (self.heads, self.width, self.width_v)
        states, final = self.new(self.rows, *shape, dtype=self.stored), self.new(self.sequences, *shape)
        common = self.common(self.width, self.form, scale, exclusive) | {"BV": self.bv}
        kernel = _state_kernel
        if weights is not None:
            # Their product needs all channels of the state at once.
            kernel = _state_kernel if self.width <= WIDEST // 2 else _wide_state_kernel
            common["BK"] = tile(self.width, WIDEST)
            narrow = self.form == CHANNEL.value or largest(self.v.dtype) < 64
            common["BV"] = tile(self.width_v, 16 if narrow else 32)
        tiles = triton.cdiv(self.width, common["BK"]) * triton.cdiv(self.width_v, common["BV"])
        kernel[grid(self.sequences * self.heads, tiles)](
            x, y, self.decay, more, values, weights, base, initial, states, final, self.first,
            x_strides=strides(x, self.heads), y_strides=strides(y, self.heads), m_strides=strides(more, self.heads),
            V=self.width_v, REVERSE=reverse, **common,
        )  # fmt: skip
        return states, final

    def scores(
        self, q: Tensor, k: Tensor, scale: float = 1.0, *, decayed: bool = True, exclusive: bool = False,
        bonus: Tensor | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(rows, h, size, size): the decayed products of q and k within a chunk, or the plain ones."""
        form = self.form if decayed else NONE.value
        scores = self.new(self.rows, self.heads, self.size, self.size, dtype=self.stored) if out is None else out
        common, height, kernel = self.common(q.shape[3], form, scale, exclusive), self.size, _score_kernel
        if form == CHANNEL.value:
            # Narrow, since each pair of steps has a decay for each of the tile's channels.
            height, common["BK"], kernel = BLOCK.value, 16, _block_score_kernel
        kernel[grid(self.rows * self.heads, self.size // height)](
            q, k, self.decay, bonus, scores, self.table, q_strides=strides(q, self.heads),
            k_strides=strides(k, self.heads), ROWS=height, **common,
        )  # fmt: skip
        return scores

    def outputs(
        self, x: Tensor, y: Tensor, scores: Tensor, states: Tensor, scale: float = 1.0, *, exclusive: bool = False,
        reverse: bool = False, more_scores: Tensor | None = None, more: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(b, t, h, v) in v's dtype: what x reads of the states, and scores @ y (more_scores @ more) in a chunk."""
        out = self.new(*self.v.shape, dtype=self.v.dtype)
        _output_kernel[grid(self.rows * self.heads, triton.cdiv(self.width_v, self.bv))](
            x, y, self.decay, scores, states, more_scores, more, out, self.table, x_strides=strides(x, self.heads),
            y_strides=strides(y, self.heads), m_strides=strides(more, self.heads), V=self.width_v, REVERSE=reverse,
            BV=self.bv, **self.common(self.width, self.form, scale, exclusive),
        )  # fmt: skip
        return out

    def gradients(
        self, q: Tensor, k: Tensor, do: Tensor, v: Tensor, score_grads: Tensor, scale: float = 1.0, *,
        states: Tensor | None = None, state_grads: Tensor | None = None, exclusive: bool = False,
        bonus: Tensor | None = None, dq: Tensor | None = None, dk: Tensor | None = None, dd: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Of q, k (both (b, t, h, k)), of the decay and of the bonus (empty where there is none).

        dq, dk and dd are added to where they are given; dd, then, has nothing of the state that a chunk keeps. A scalar
        decay's gradient is (tiles, b, t, h), to be summed.
        """
        b, t, h, width = self.batch, self.length, self.heads, self.width
        common = self.common(width, self.form, scale, exclusive)
        # Half as wide as elsewhere, since q, k and their gradients are all kept.
        common["BK"] = max(16, common["BK"] // 2)
        parts = triton.cdiv(width, common["BK"])
        shapes = {NONE.value: (0,), SCALAR.value: (parts, b, t, h), CHANNEL.value: (b, t, h, width)}
        adds = {"ADD_Q": dq is not None, "ADD_K": dk is not None, "ADD_D": dd is not None}
        dq, dk = (self.new(b, t, h, width, dtype=dtype) if x is None else x for x in (dq, dk))
        dd = self.new(*shapes[self.form]) if dd is None else dd
        du = self.new(*((0,) if bonus is None else (self.rows, h, width)))
        _gradient_kernel[grid(self.rows * h, parts)](
            q, k, v, do, self.decay, bonus, states, state_grads, score_grads, dq, dk, dd, du, self.table,
            q_strides=strides(q, h), k_strides=strides(k, h), v_strides=strides(v, h), do_strides=strides(do, h),
            tokens=b * t, V=self.width_v, BV=self.bv, **common, **adds,
        )  # fmt: skip
        return dq, dk, dd, du


def shared(x: Tensor, like: Tensor) -> Tensor:
    """A gradient per head, (b, t, h, k), summed over the heads that share one of `like`'s, in its dtype."""
    b, t, h, k = x.shape
    groups = like.shape[2]
    return (x if groups == h else x.view(b, t, groups, h // groups, k).sum(3)).to(like.dtype)
