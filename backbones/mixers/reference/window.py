"""Sliding-window attention with sinks by its papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import finished, projected
from .common import attend


def reference(mixer: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    Attention of token i to the tokens j with i − window < j ≤ i (Longformer, arXiv 2004.05150, section 3.1; causal
    as its section 4), and to the first `sinks` tokens (StreamingLLM, arXiv 2309.17453, section 3.2).

    Both ways |i − j| < window. StreamingLLM counts rotary positions within its cache; here, as in the sequence.
    """
    q, k, v, gate = projected(mixer, x)
    place = torch.arange(x.shape[1])
    apart = place[:, None] - place
    seen = (apart.abs() < mixer.window) | (place < mixer.sinks)
    if causal:
        seen = seen & (apart >= 0)
    return finished(mixer, attend(q, k, v, seen), gate)
