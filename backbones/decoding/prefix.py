"""The state after a long prompt, computed once and reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import CheckpointError
from ...utils.files import replace_tensors
from ..language import LanguageModel
from ..serialization import to_dict
from ..state import State
from .prefill import as_lists, check_decoder, evaluating, read

# Elements of each weight that enter the fingerprint: training changes nearly all of them.
SAMPLES = 256
FORMAT = "omnimix prefix 2"


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A text that was read.

    Args:
        state: after its last token, of one sequence.
        logits: of the next token, float32 or wider.
        tokens: its ids, which a repetition penalty looks at.
    """

    state: State
    logits: Float[Tensor, "1 v"]
    tokens: list[int]

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return len(self.tokens)


def read_prefix(model: LanguageModel, tokens: Sequence[int] | Int[Tensor, " t"], *, chunk: int | None = None) -> Prefix:
    """Prefill a text once, for `generate` and `stream` to continue from.

    Args:
        tokens: ids.
        chunk: tokens that are read at a time, to bound the memory; all by default.

    Raises:
        UnsupportedCall: the model is not decoded token by token, with the remedy.
        UnsupportedShape: no token, or ids outside the vocabulary.
    """
    check_decoder(model)
    rows = as_lists([list(map(int, tokens))], model.vocab_size, empty=False)
    with evaluating(model), torch.inference_mode():
        logits, state = read(model, rows, chunk)
    return Prefix(state=state, logits=logits, tokens=rows[0])


def fingerprint(model: LanguageModel) -> str:
    """A digest of a model's configuration and of samples of its weights, the same on every device."""
    digest = hashlib.sha256(json.dumps(to_dict(model.config), sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_prefix(path: str | Path, prefix: Prefix, model: LanguageModel) -> None:
    """Write a prefix as safetensors, with the fingerprint of the model that read it; whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in prefix.state.named_tensors()}
    tensors |= {"logits": prefix.logits.detach().cpu().contiguous().clone(), "tokens": torch.tensor(prefix.tokens)}
    about = {"format": FORMAT, "model": fingerprint(model)}
    replace_tensors(path, tensors, about)


def load_prefix(path: str | Path, model: LanguageModel) -> Prefix:
    """What `save_prefix` wrote, on the model's device. No code in the file is run.

    Raises:
        CheckpointError: the file is missing or corrupt, or another model read the prefix.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; read the text again (read_prefix)") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no prefix, or one of another version; read the text again (read_prefix)")
    if about.get("model") != fingerprint(model):
        raise CheckpointError(
            f"{path} was read by a model with another configuration or other weights; read the text again (read_prefix)"
        )
    device, template = model.embedding.weight.device, model.init_state(1)
    wanted = {name: t.shape for name, t in template.named_tensors()} | {"logits": (1, model.vocab_size), "tokens": (1,)}
    found = {name: t.shape for name, t in tensors.items()}
    if wanted.keys() != found.keys() or any(len(found[n]) != len(shape) for n, shape in wanted.items()):
        raise CheckpointError(f"{path} does not hold the state of this model; read the text again (read_prefix)")
    placed = {name: t.to(device) for name, t in tensors.items()}
    return Prefix(state=_filled(template, placed), logits=placed["logits"], tokens=tensors["tokens"].tolist())


def _filled(state: State, tensors: dict[str, Tensor], path: str = "") -> State:
    """`state` with the tensors of these paths."""
    return State(
        {
            name: _filled(part, tensors, f"{path}{name}/") if isinstance(part, State) else tensors[f"{path}{name}"]
            for name, part in state.parts.items()
        }
    )
