"""Small models that the tests of decoding write with."""

from __future__ import annotations

import torch

from omnimix import LanguageModel, LanguageModelConfig
from omnimix.backbones import BackboneConfig
from omnimix.backbones.mixers import get_mixer

V = 13
END = 3
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [4, 5, 6, 1], [7, 7]]


def tiny(pattern: list[str], *, seed: int = 0, vocab_size: int = V) -> LanguageModel:
    """A model whose texts wander: large random weights everywhere, float64."""
    torch.manual_seed(seed)
    names = {name for entry in pattern for name in entry.split("+")}
    backbone = BackboneConfig(
        dim=32,
        depth=len(pattern),
        pattern=pattern,
        mixers={name: get_mixer(name).examples[0] for name in names},
    )
    config = LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, tie_word_embeddings=False)
    model = LanguageModel(config).double()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.copy_(noise * p.shape[1] ** -0.5 if p.ndim > 1 else p + 0.3 * noise)
        model.embedding.weight.mul_(5)
        model.head.weight.mul_(2)
    return model


def far(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
