"""The models that `omnimix bench decode` times, ours and transformers', with one interface."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..backbones.config import BackboneConfig, BlockConfig, Site
from ..backbones.ffn import get_ffn
from ..backbones.language import LanguageModel, LanguageModelConfig
from ..backbones.layout import Layout
from ..backbones.mixers import get_mixer
from ..errors import ConfigError

OURS, THEIRS = "omnimix", "transformers"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all models of a table share.

    Args:
        dim: width.
        depth: layers.
        vocab_size: tokens; the output matrix is the embedding.
        batch: sequences that are decoded together.
        window: tokens that the window model sees.
    """

    dim: int = 768
    depth: int = 4
    vocab_size: int = 4096
    batch: int = 1
    window: int = 512

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


class Decoder(ABC):
    """A language model that prefills a prompt and then decodes token by token; `memory` is what it remembers."""

    net: nn.Module

    @abstractmethod
    def read(self, tokens: Tensor, memory: Any) -> Any:
        """Read (b, t) tokens, with the logits of the last ones only; returns the memory after them."""

    @abstractmethod
    def step(self, token: Tensor, memory: Any) -> Any:
        """The logits after one more token, (b, 1); returns the memory after it."""

    @abstractmethod
    def tensors(self, memory: Any) -> list[Tensor]:
        """What the memory holds."""

    def fork(self, memory: Any) -> Any:
        """A memory that another one's steps do not change."""
        return memory


class Ours(Decoder):
    """A language model of ours, through its public forward."""

    net: LanguageModel

    def __init__(self, pattern: tuple[str | BlockConfig, ...], ffn: str | None, sizes: Sizes):
        mixers = {"window": get_mixer("window").config(window=sizes.window)} if "window" in pattern else {}
        backbone = BackboneConfig(dim=sizes.dim, depth=sizes.depth, pattern=pattern, ffn=ffn, mixers=mixers)
        self.net = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=sizes.vocab_size))

    def read(self, tokens: Tensor, memory: Any) -> Any:
        out = self.net.hidden(tokens, Layout(causal=True), memory)
        self.net.logits(out.y[:, -1:])
        return out.state

    def step(self, token: Tensor, memory: Any) -> Any:
        return self.net(token, memory)[1]

    def tensors(self, memory: Any) -> list[Tensor]:
        return memory.tensors()


class Theirs(Decoder):
    """A model of transformers with its cache, which changes in place.

    Args:
        net: the model.
        argument: under which it takes its cache, and the name under which it returns it.
    """

    def __init__(self, net: nn.Module, argument: str):
        self.net, self.argument = net, argument

    def read(self, tokens: Tensor, memory: Any) -> Any:
        return self.net(tokens, **{self.argument: memory}, use_cache=True, logits_to_keep=1)[self.argument]

    def step(self, token: Tensor, memory: Any) -> Any:
        return self.read(token, memory)

    def tensors(self, memory: Any) -> list[Tensor]:
        found: list[Tensor] = []
        waiting = [layer.__dict__ for layer in memory.layers]
        while waiting:
            part = waiting.pop()
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, dict | list | tuple):
                waiting += part.values() if isinstance(part, dict) else part
        return found

    def fork(self, memory: Any) -> Any:
        return copy.deepcopy(memory)


def _mamba2(sizes: Sizes) -> Decoder:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        expand=2,
        num_heads=2 * sizes.dim // 64,
        head_dim=64,
        state_size=128,
        n_groups=1,
        conv_kernel=4,
        num_hidden_layers=sizes.depth,
        tie_word_embeddings=True,
    )
    return Theirs(Mamba2ForCausalLM(config), "cache_params")


def _llama(sizes: Sizes) -> Decoder:
    from transformers import LlamaConfig, LlamaForCausalLM

    ffn = get_ffn("swiglu")
    inner = ffn.build(sizes.dim, ffn.config(), Site()).get_submodule("out_proj").get_parameter("weight").shape[1]
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=inner,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.dim // 64,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )
    return Theirs(LlamaForCausalLM(config), "past_key_values")


# Ours by name: the pattern, and what follows each mixer.
MODELS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "mamba2": (("mamba2",), None),
    "gla": (("gla",), "swiglu"),
    "gated_deltanet": (("gated_deltanet",), "swiglu"),
    "hybrid": (("mamba2", "mamba2", "mamba2", "attention"), None),
    "window": (("window",), "swiglu"),
    "attention": (("attention",), "swiglu"),
}
PEERS = {"mamba2": _mamba2, "attention": _llama}
DEFAULT = ("mamba2", "hybrid", "window", "attention")


def build(model: str, side: str, sizes: Sizes) -> Decoder:
    return PEERS[model](sizes) if side == THEIRS else Ours(*MODELS[model], sizes)
