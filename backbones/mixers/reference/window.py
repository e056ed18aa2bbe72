"""Sliding-window attention with sinks by its papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import finished, projected
from .common import attend


def reference(mixer: Any, config: Any, x: Tensor, causal: bool) -> Tensor:
    """Mix `x` (b, t, d) by the paper's equations.

    Attention of token i to the tokens j with i − window < j ≤ i (Longformer, arXiv 2004.05150, section 3.1; causal
    as its section 4), and to the first `sinks` tokens (StreamingLLM, arXiv 2309.17453, section 3.2).

    Bidirectional: |i − j| < window. StreamingLLM counts rotary positions within its cache; here, as in the sequence.
    """
    q, k, v, gate = projected(mixer, config, x)
    place = torch.arange(x.shape[1])
    apart = place[:, None] - place
    seen = (apart.abs() < config.window) | (place < config.sinks)
    if causal:
        seen = seen & (apart >= 0)
    return finished(mixer, config, attend(q, k, v, seen), gate)
