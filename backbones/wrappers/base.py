"""The registry of layers around layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..block import Block
from ..config import INHERIT, BlockConfig, MixerConfig, Site, resolved
from ..layer import SequenceLayer
from ..registry import Registry
from ..scan import scan_orders


@dataclass(frozen=True, kw_only=True)
class WrapperConfig(MixerConfig):
    """Base of the options of wrappers, which stand where a mixer may."""


WRAPPERS: Registry[SequenceLayer] = Registry("wrapper", base=WrapperConfig)
register_wrapper = WRAPPERS.register


def inner_block(dim: int, entry: BlockConfig | str, site: Site) -> Block:
    """A block inside a wrapper."""
    entry = resolved(entry)
    if entry.scan != INHERIT:
        site = dataclasses.replace(site, scan=scan_orders(entry.scan))
    return Block(dim, entry, site)
