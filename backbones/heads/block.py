"""Block diffusion: masked diffusion inside blocks, one block after the other (BD3-LM, arXiv 2503.09573)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import bounded, fraction, positive
from ..layer import Capabilities
from ..layout import Layout, offsets, pack_rows, unpack
from ..state import State
from .denoiser import Denoiser, DenoiserConfig
from .noise import LEAST_LEVEL, draw_subsets, even, generator_of, noise_levels, paired_error, scored_tokens
from .objective import Likelihood, ObjectiveLoss, register_objective

if TYPE_CHECKING:
    from ..language import LanguageModel

# Tokens whose states an estimate of a likelihood holds at a time.
TOKENS_AT_A_TIME = 16384


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(DenoiserConfig):
    """Options of `block`, with those of every denoiser.

    Args:
        block: tokens in a block. With 1 the model is autoregressive, and its loss −log p itself.
        low, high: masking probabilities that are trained on; narrower than (0, 1) the gradient varies less (clipped
            schedules, arXiv 2503.09573, section 4). Evaluation always uses the whole range.
        stratified: the blocks of a batch share out this range among them.
    """

    block: int = 16
    low: float = LEAST_LEVEL
    high: float = 1.0
    stratified: bool = True

    def __post_init__(self) -> None:
        positive(self, "block")
        fraction(self, "low")
        bounded(self, "high", above=self.low, most=1, wanted=f"above low, {self.low}, and at most 1")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Masked tokens of one block: the backbone's outputs that predict them and their (variant, row, place)."""

    y: Float[Tensor, "m d"]
    where: tuple[Int[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, " m"]]
    losses: Mapping[str, Tensor]
    tokens: int


@register_objective(
    "block",
    BlockDiffusionConfig,
    summary="masked tokens of a block from the rest of it and all before",
    source="arXiv 2503.09573",
    examples=(
        BlockDiffusionConfig(block=3),
        BlockDiffusionConfig(block=1, shift=True),
        BlockDiffusionConfig(block=4, low=0.3, high=0.8),
    ),
)
class BlockDiffusion(Denoiser):
    """Σ over blocks of `masked`'s bound on −log p(block | blocks before it).

    Blocks count from the start of each sequence, whose first token is given. The model walks over them as decoding
    does: each one is read twice from the state before it, clean and with masked tokens, in one call, and the clean
    copy's state is kept; the gradient flows through it. So it serves every mixer, and training and decoding are the
    same computation. (The paper's form for attention, one pass over clean ‖ noisy, computes the same.)
    """

    config: BlockDiffusionConfig
    block: int
    view = "bidirectional within a block, and resume from a state"

    def __init__(self, dim: int, vocab_size: int, config: BlockDiffusionConfig):
        super().__init__(dim, vocab_size, config)
        self.block = config.block

    def serves(self, can: Capabilities) -> bool:
        return can.streaming and (can.blockwise or (self.block == 1 and can.causal))

    def loss(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> ObjectiveLoss:
        scored = scored_tokens(tokens, cu_seqlens, lengths, counted)
        if cu_seqlens is not None:
            tokens, scored, lengths = unpack(tokens, cu_seqlens), unpack(scored, cu_seqlens), cu_seqlens.diff()
        rate = self._rate(tokens, clipped=model.training)
        masked = scored & (torch.rand_like(rate) < rate)
        sizes = [tokens.shape[1]] * len(tokens) if lengths is None else lengths.tolist()
        found = list(self._walk(model, tokens, sizes, masked[None]))
        y = torch.cat([part.y for part in found])
        _, rows, places = (torch.cat(index) for index in zip(*(part.where for part in found), strict=True))
        nats = self.token_nats(model, y, tokens[rows, places])
        # Where nothing was masked the estimate is 0, and a backward pass still has its path.
        bound = (nats / rate[rows, places]).sum() if nats.numel() else y.sum()
        count = int(scored.sum())
        loss = bound / count
        parts = {"bound": loss.detach()}
        read = sum(part.tokens for part in found)
        for name in found[0].losses:
            extra = torch.stack([part.losses[name] * part.tokens for part in found]).sum() / read
            parts[name] = extra.detach()
            loss = loss + extra
        return ObjectiveLoss(loss=loss, nats=bound.detach(), count=count, parts=parts)

    def _rate(self, tokens: Int[Tensor, "n t"], *, clipped: bool) -> Float[Tensor, "n t"]:
        """The probability with which each token is masked, one a block."""
        (n, t), config = tokens.shape, self.config
        if self.block == 1:
            return torch.ones(n, t, device=tokens.device)
        low, high = (config.low, config.high) if clipped else (LEAST_LEVEL, 1.0)
        blocks = -(-t // self.block)
        levels = noise_levels(n * blocks, tokens.device, low=low, high=high, stratified=config.stratified)
        return levels.view(n, blocks).repeat_interleave(self.block, dim=1)[:, :t]

    def _walk(
        self, model: LanguageModel, tokens: Int[Tensor, "n t"], sizes: list[int], masked: Bool[Tensor, "v n t"]
    ) -> Iterator[_Found]:
        """The masked tokens of each block, for v variants of every row's mask; `sizes`: the rows' lengths."""
        if self.block == 1 and self.shift:
            yield self._causal(model, tokens, sizes, masked)
            return
        block = self.block
        needed = torch.stack([part.any(-1) for part in masked.split(block, dim=2)], dim=2).tolist()
        alive, state, last = list(range(len(tokens))), None, None
        for number, start in enumerate(range(0, max(sizes), block)):
            clean = [i for i in alive if sizes[i] > start + block]
            noisy = [(v, i) for v, rows in enumerate(needed) for i in alive if rows[i][number]]
            if not (clean or noisy or start):
                # Nothing is masked at all; a loss still needs a path to the parameters.
                noisy = [(0, i) for i in alive]
            if clean or noisy:
                before = None
                if state is not None and last is not None:
                    order = {row: place for place, row in enumerate(alive)}
                    index = [order[i] for i in clean] + [order[i] for _, i in noisy]
                    index = torch.tensor(index, device=tokens.device)
                    before = state.select(index)
                    last = last[index]
                piece = _Piece(tokens, sizes, masked, clean, noisy, start, block, model.mask_token)
                out = model.hidden(
                    piece.tokens, Layout(causal="block", block=block, cu_seqlens=piece.boundaries), before
                )
                y = out.y.flatten(0, 1)
                yield piece.found(y, last, self.shift, out.losses)
                # Blocks are causal, and so there is a state.
                state = piece.keep(out.state)  # pyright: ignore[reportArgumentType]
                last = y[piece.slots[: len(clean), -1]]
            if not clean:
                return
            alive = clean

    def _causal(
        self, model: LanguageModel, tokens: Int[Tensor, "n t"], sizes: list[int], masked: Bool[Tensor, "v n t"]
    ) -> _Found:
        """Blocks of one token, predicted at the place before, are never read masked: one pass over all."""
        lengths = torch.tensor(sizes, device=tokens.device)
        boundaries = offsets(lengths)
        out = model.hidden(pack_rows(tokens, lengths), Layout(causal="block", block=1, cu_seqlens=boundaries))
        variants, rows, places = masked.nonzero().unbind(1)
        y = out.y[0, boundaries[rows] + places - 1]
        return _Found(y=y, where=(variants, rows, places), losses=out.losses, tokens=out.y.shape[1])

    @torch.no_grad()
    def log_likelihood(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        counted: Tensor | None = None,
        samples: int = 32,
        seed: int = 0,
    ) -> Likelihood:
        """An estimate of the bound with its standard error; of blocks of one token −log p itself.

        As in `Masked.log_likelihood` a row's draws depend on the seed and its tokens alone, and `samples` is rounded
        up to an even number.
        """
        exact = self.block == 1
        samples = 1 if exact else even(samples)
        scored = scored_tokens(tokens, None, lengths, counted)
        sizes = [tokens.shape[1]] * len(tokens) if lengths is None else lengths.tolist()
        masked, weight = scored[None], scored[None].double()
        if not exact:
            drawn = [self._draw(t[:n], s, samples, seed) for t, s, n in zip(tokens, scored, sizes, strict=True)]
            masked, weight = (torch.stack(both, 1).to(tokens.device) for both in zip(*drawn, strict=True))
        values = weight.new_zeros(samples, len(tokens), -(-tokens.shape[1] // self.block))
        at_once = max(1, TOKENS_AT_A_TIME // tokens.numel())
        for first in range(0, samples, at_once):
            for part in self._walk(model, tokens, sizes, masked[first : first + at_once]):
                variants, rows, places = part.where
                cost = self.token_nats(model, part.y, tokens[rows, places]) * weight[first + variants, rows, places]
                values.index_put_((first + variants, rows, places // self.block), cost, accumulate=True)
        nats = values.mean(0).sum(1).cpu()
        if exact:
            return Likelihood(nats=nats)
        errors = [torch.stack([paired_error(v) for v in row.T]).square().sum().sqrt() for row in values.unbind(1)]
        return Likelihood(nats=nats, error=torch.stack(errors).cpu(), samples=samples, bound=True)

    def _draw(
        self, row: Int[Tensor, " t"], scored: Bool[Tensor, " t_padded"], samples: int, seed: int
    ) -> tuple[Bool[Tensor, "s t_padded"], Float[Tensor, "s t_padded"]]:
        """For each sample which tokens are masked, and what they count; each block draws for itself."""
        generator = generator_of(seed, row)
        masked = torch.zeros(samples, len(scored), dtype=torch.bool)
        weight = torch.zeros(samples, len(scored), dtype=torch.float64)
        for start in range(0, len(scored), self.block):
            places = start + scored[start : start + self.block].cpu().nonzero()[:, 0]
            if len(places):
                masked[:, places], own = draw_subsets(len(places), samples, generator)
                weight[:, places] = own[:, None]
        return masked, weight


class _Piece:
    """One block of several sequences: clean copies first, then masked ones; packed where their lengths differ.

    Args:
        clean: rows of `tokens` that continue after this block, which are read unmasked.
        noisy: (variant, row) of the masks under which they are read.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "n t"],
        sizes: list[int],
        masked: Bool[Tensor, "v n t"],
        clean: list[int],
        noisy: list[tuple[int, int]],
        start: int,
        block: int,
        mask_token: int,
    ):
        device, stop = tokens.device, start + block
        self.start, self.clean = start, len(clean)
        self.variants = torch.tensor([v for v, _ in noisy], device=device, dtype=torch.int64)
        self.rows = torch.tensor(clean + [i for _, i in noisy], device=device)
        widths = [min(block, sizes[i] - start) for i in clean + [i for _, i in noisy]]
        held = tokens[self.rows, start:stop][:, : max(widths)]
        self.hidden = torch.zeros_like(held, dtype=torch.bool)
        self.hidden[len(clean) :] = masked[self.variants, self.rows[len(clean) :], start:stop][:, : max(widths)]
        held = held.masked_fill(self.hidden, mask_token)
        # Each token's place among the tokens of all copies.
        self.slots = torch.arange(held.numel(), device=device).view(held.shape)
        self.tokens, self.boundaries = held, None
        if len(set(widths)) > 1:
            widths = torch.tensor(widths, device=device)
            valid = torch.arange(held.shape[1], device=device) < widths[:, None]
            self.slots = (valid.flatten().cumsum(0) - 1).view(held.shape)
            self.tokens, self.boundaries = held[valid][None], torch.cat([widths.new_zeros(1), widths.cumsum(0)])

    def found(
        self, y: Float[Tensor, "p d"], last: Float[Tensor, "copies d"] | None, shift: bool, losses: Mapping[str, Tensor]
    ) -> _Found:
        """The outputs `y` of all copies at masked tokens; `last`: those at each copy's token before this block."""
        copies, columns = self.hidden.nonzero().unbind(1)
        at = self.slots[copies, columns] - int(shift)
        source = y
        if shift and last is not None:
            source = torch.cat([y, last])
            at = torch.where(columns == 0, len(y) + copies, at)
        where = (self.variants[copies - self.clean], self.rows[copies], self.start + columns)
        return _Found(y=source[at], where=where, losses=losses, tokens=len(y))

    def keep(self, state: State) -> State:
        """The states of the clean copies."""
        index = torch.arange(self.clean, device=self.rows.device)
        return state.select(index)
