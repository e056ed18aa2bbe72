"""A packed batch of images with a grid each (NaViT, arXiv 2307.06304), scanned in every direction."""

from __future__ import annotations

from omnimix.backbones import BackboneConfig

from . import System

SYSTEMS = {
    f"packed_images_{scan}": System(
        config=BackboneConfig(dim=16, depth=2, pattern=("mamba2", "attention"), scan=scan),
        grids=((1, 3, 4), (2, 2, 2), (1, 5, 1)),
    )
    for scan in ("cross", "hilbert", "cross-3d")
}
