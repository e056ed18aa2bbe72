"""Masking noise: how much of a sequence is hidden, which tokens, and what each hidden one counts.

Under the log-linear schedule a token is masked at time t with probability t, and the bound on −log p is
∫₀¹ (1/t) E[Σ_masked −log p(token | rest)] dt (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992, section 2). The number
l of masked tokens among L is then uniform in 1 … L, and given l all subsets are equally likely; hence the bound is also
E_l[(L/l) E_|S|=l[Σ_S −log p]] (LLaDA, on evaluating likelihoods), whose estimates vary less.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import UnsupportedShape

# A masking probability below which nothing is trained on: its weight would be larger than 1 / 0.001.
LEAST_LEVEL = 1e-3


def noise_levels(
    n: int, device: torch.device, *, low: float = 0.0, high: float = 1.0, stratified: bool = True
) -> Float[Tensor, " n"]:
    """n masking probabilities, each uniform in (low, high], from torch's global generator.

    Stratified, every n-th part of the range holds one, in random order (MDLM, arXiv 2406.07524, appendix; the
    low-discrepancy sampler of arXiv 2107.00630, appendix I).
    """
    uniform = torch.rand(n, device=device)
    if stratified:
        uniform = (torch.randperm(n, device=device) + uniform) / n
    return high - (high - low) * uniform


def scored_tokens(
    tokens: Int[Tensor, "b t"],
    cu_seqlens: Int[Tensor, " n_plus_1"] | None,
    lengths: Int[Tensor, " b"] | None,
    counted: Bool[Tensor, "b t"] | None,
) -> Bool[Tensor, "b t"]:
    """Which tokens are scored: the counted ones, but for padding and the first of each sequence, which is given.

    Raises:
        UnsupportedShape: there is none.
    """
    scored = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted.clone()
    if lengths is not None:
        scored &= torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    if cu_seqlens is None:
        scored[:, 0] = False
    else:
        scored[0, cu_seqlens[:-1].long()] = False
    if not scored.any():
        raise UnsupportedShape(f"tokens: of {tuple(tokens.shape)} none is left to be predicted")
    return scored


def generator_of(seed: int, tokens: Int[Tensor, " t"]) -> torch.Generator:
    """A source of draws that depends on the seed and the sequence, not on what else is in its batch; on the CPU."""
    digest = hashlib.blake2b(f"{seed} {tokens.tolist()}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_subsets(
    candidates: int, samples: int, generator: torch.Generator
) -> tuple[Bool[Tensor, "s c"], Float[Tensor, " s"]]:
    """Which of the candidates each sample masks, and what each of its masked tokens counts, (candidates / masked).

    How many is uniform in 1 … candidates: samples 2k and 2k + 1 draw from the k-th of samples / 2 equal parts of that
    range (see `paired_error`). Given how many, every subset is as likely. Drawn on the CPU.
    """
    strata = samples // 2
    part = torch.arange(strata).repeat_interleave(2)
    uniform = (part + torch.rand(samples, generator=generator, dtype=torch.float64)) / strata
    size = (1 + (uniform * candidates).long()).clamp(max=candidates)
    rank = torch.rand(samples, candidates, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    return rank < size[:, None], candidates / size.double()


def paired_error(values: Float[Tensor, " s"]) -> Float[Tensor, ""]:
    """The standard error of the mean of values that were drawn in pairs, each pair from a stratum of its own.

    A stratum's variance is estimated by (x − y)² / 2 without bias, the mean of its pair has half of it.
    """
    pairs = values.view(-1, 2)
    return (pairs.diff(dim=1).square().sum() / 4).sqrt() / len(pairs)


def even(samples: int) -> int:
    """So many samples, or one more: they come in pairs."""
    if samples < 2:
        raise UnsupportedShape(f"samples: {samples} draws say nothing of their own error; take at least 2")
    return samples + samples % 2
