"""What every feed-forward layer is."""

from __future__ import annotations

from ..config import FFNConfig
from ..layer import SequenceLayer
from ..registry import Registry


class FFN(SequenceLayer):
    """Mixes the channels of tokens: of each by itself, unless its `capabilities` say otherwise."""


FFNS: Registry[FFN] = Registry("feed-forward layer", base=FFNConfig)
register_ffn = FFNS.register
