"""Reading prompts: ragged ones together, in pieces where memory is short, with logits for the last tokens only."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import index
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError, NotFinite, UnsupportedCall, UnsupportedShape
from ..language import LanguageModel
from ..layer import unfit
from ..layout import Layout
from ..state import State
from .config import GenerationConfig

CAUSAL = Layout(causal=True)


# Modules that were in training mode, and how many calls hold them in evaluation mode now: calls of several threads
# overlap, and the first to finish must not switch dropout on under the others.
_held: dict[torch.nn.Module, int] = {}
_holding = threading.Lock()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; once the last of overlapping calls is done, each of its modules is as before."""
    with _holding:
        held = [m for m in model.modules() if m.training or m in _held]
        if any(m.training for m in held):
            model.eval()
        for module in held:
            _held[module] = _held.get(module, 0) + 1
    try:
        yield
    finally:
        with _holding:
            for module in held:
                _held[module] -= 1
                if not _held[module]:
                    del _held[module]
                    module.training = True


def check_decoder(model: LanguageModel, config: GenerationConfig | None = None) -> None:
    """Raise UnsupportedCall unless the model writes one token after the other, ConfigError unless it may write some."""
    if model.objective.decoder != "autoregressive":
        raise UnsupportedCall(
            f"objective {model.config.objective_name!r} is decoded by {model.objective.decoder}, not token by token; "
            "call omnimix.backbones.decoding.diffuse, or train with objective='causal'"
        )
    if name := unfit(model.backbone, lambda can: can.streaming and can.causal):
        raise UnsupportedCall(f"{name} does not resume from a state, which decoding needs; choose another layer")
    forbidden = set() if config is None else set(config.forbidden)
    if forbidden and (min(forbidden) < 0 or max(forbidden) >= model.vocab_size or len(forbidden) == model.vocab_size):
        raise ConfigError(
            f"GenerationConfig.forbidden holds {len(forbidden)} ids from {min(forbidden)} to {max(forbidden)}; it must "
            f"leave one of the model's 0 to {model.vocab_size - 1}"
        )


def as_lists(prompts: Sequence[Sequence[int]] | Int[Tensor, "n t"], vocab_size: int, *, empty: bool) -> list[list[int]]:
    """Prompts as lists of ids.

    Raises:
        UnsupportedShape: none, an empty one unless `empty`, or ids that the model does not know.
    """
    if isinstance(prompts, Tensor) and (prompts.ndim != 2 or prompts.dtype.is_floating_point):
        raise UnsupportedShape(
            f"prompts: a {prompts.dtype} tensor of shape {tuple(prompts.shape)}; it must hold integers, (n, t)"
        )
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [_ids(prompt, i) for i, prompt in enumerate(prompts)]
    if not rows:
        raise UnsupportedShape("prompts: there is none; pass at least one")
    for i, row in enumerate(rows):
        if not row and not empty:
            raise UnsupportedShape(f"prompts: number {i} is empty; begin with the tokenizer's end token")
        if row and not (0 <= min(row) and max(row) < vocab_size):
            raise UnsupportedShape(
                f"prompts: ids of number {i} reach from {min(row)} to {max(row)}, and the model knows 0 to "
                f"{vocab_size - 1}; is this its tokenizer?"
            )
    return rows


def _ids(prompt: Any, number: int) -> list[int]:
    """The ids of one prompt."""
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        raise UnsupportedShape(
            f"prompts: number {number} is the text {prompt[:40]!r}; pass its ids, tokenizer.encode(text), or have "
            "omnimix.load(run).generate encode it"
        )
    try:
        return [index(each) for each in prompt]
    except TypeError as error:
        raise UnsupportedShape(
            f"prompts: number {number} is {prompt!r}; each prompt must be a list of integers, such as [[1, 2]] for one"
        ) from error


def last_logits(model: LanguageModel, y: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """Logits of float32 or wider.

    Raises:
        NotFinite: a row holds NaN or infinity, or nothing but -infinity, from which no token can be chosen.
    """
    logits = model.logits(y)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # NaN and infinity are the largest of their row, and stay what they are in a sum.
    if not math.isfinite(logits.amax(-1).sum(dtype=torch.float64)):
        raise NotFinite(
            "the model's logits are NaN or infinite; do its weights hold such values, or do activations exceed "
            f"{y.dtype}?"
        )
    return logits


def advance(model: LanguageModel, tokens: Int[Tensor, " n"], state: State) -> tuple[Float[Tensor, "n v"], State]:
    """Read one token a sequence. `model.hidden` would check the ids, which are our own, at every step."""
    out = model.backbone(model.embedding(tokens[:, None]), CAUSAL, state)
    return last_logits(model, out.y[:, 0]), out.state


def read(
    model: LanguageModel, prompts: Sequence[Sequence[int]], chunk: int | None = None, state: State | None = None
) -> tuple[Float[Tensor, "n v"], State]:
    """Read prompts of any lengths, none empty.

    Args:
        chunk: tokens of a prompt that are read at a time; all by default.
        state: of each sequence before its prompt; the beginning by default.

    Returns:
        The logits after each prompt's last token, float32 or wider, and the states.
    """
    device = model.embedding.weight.device
    chunk = max(map(len, prompts)) if chunk is None else chunk
    alive, place = list(range(len(prompts))), 0
    finished, outputs, states = [], [], []
    while alive:
        stop = place + chunk
        y, state = _read_pieces(model, [prompts[i][place:stop] for i in alive], state, device)
        done = [j for j, i in enumerate(alive) if len(prompts[i]) <= stop]
        if done:
            index = torch.tensor(done, device=device)
            outputs.append(y[index])
            states.append(state if len(done) == len(alive) else state.select(index))
            finished += [alive[j] for j in done]
            left = [j for j in range(len(alive)) if j not in set(done)]
            state = state.select(torch.tensor(left, device=device, dtype=torch.int64)) if left else None
            alive = [alive[j] for j in left]
        place = stop
    logits = last_logits(model, torch.cat(outputs))
    joined = states[0] if len(states) == 1 else State.join(states)
    if finished == sorted(finished):
        return logits, joined
    order = torch.tensor(finished, device=device).argsort()
    return logits[order], joined.select(order)


def _read_pieces(
    model: LanguageModel, pieces: list[Sequence[int]], state: State | None, device: torch.device
) -> tuple[Float[Tensor, "n d"], State]:
    """The backbone's outputs at the pieces' last tokens, and the states after them."""
    lengths = [len(p) for p in pieces]
    if len(set(lengths)) == 1:
        out = model.hidden(torch.tensor(pieces, device=device), CAUSAL, state)
        y = out.y[:, -1]
    else:
        tokens = torch.tensor([[token for piece in pieces for token in piece]], device=device)
        bounds = torch.tensor([0, *accumulate(lengths)], device=device)
        out = model.hidden(tokens, Layout(causal=True, cu_seqlens=bounds), state)
        y = out.y[0, bounds[1:] - 1]
    # Under a causal layout there is a state.
    return y, out.state  # pyright: ignore[reportReturnType]
