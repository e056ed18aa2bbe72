"""How a text is to be written, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import ConfigError
from ...utils.renamed import renamed_options
from ..config import bounded, positive, proportion
from ..serialization import from_dict, to_dict
from ..typed import Config

C = TypeVar("C", bound=Config)


@renamed_options(max_tokens="max_new_tokens", beams="num_beams")
@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """Options of `generate` and `stream`. The filters act in this order: penalty, forbidden, temperature, k, p, min-p.

    Args:
        max_new_tokens: at most so many tokens are generated.
        temperature: divides the logits before a token is drawn; at 0 the most probable one is taken (greedy), which no
            filter below ever removes.
        top_k: draw among the k most probable tokens.
        top_p: draw among the fewest most probable tokens that have at least this probability together (arXiv
            1904.09751).
        min_p: draw among tokens with at least this share of the most probable one's probability (arXiv 2407.01082).
        repetition_penalty: above 1 what stands in the prompt or was written is less probable (arXiv 1909.05858).
        forbidden: ids that are never written.
        stop: sequences of ids; a text that ends in one is finished.
        end: the id after which a text is finished, where there is one.
        seed: of the draws; each sequence has a generator of its own, seeded by this and its `sample_id`.
        chunk: read prompts in pieces of so many tokens, to bound the memory; None reads them whole.
        num_beams: hypotheses of a beam search; 1 for none.
        length_penalty: a hypothesis's score is the sum of its log-probabilities over length ** length_penalty.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    forbidden: Sequence[int] = ()
    stop: Sequence[Sequence[int]] = ()
    end: int | None = None
    seed: int = 0
    chunk: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens", "top_k", "chunk", "num_beams")
        bounded(self, "temperature", least=0, wanted="at least 0 (greedy) and finite")
        proportion(self, "top_p")
        bounded(self, "min_p", least=0, most=1, wanted="in [0, 1]")
        bounded(self, "repetition_penalty", above=0, wanted="above 0 (1 for none) and finite")
        bounded(self, "length_penalty", "end", "seed")
        if () in self.stop:
            raise ConfigError("GenerationConfig.stop holds an empty sequence; each needs at least one id")
        if self.num_beams > 1 and self.temperature:
            raise ConfigError(
                f"GenerationConfig.num_beams is {self.num_beams} with temperature {self.temperature}; a beam search "
                "does not sample: set temperature=0, or num_beams=1"
            )


def decoding(cls: type[C], config: C | Mapping[str, Any] | None, options: Mapping[str, Any]) -> C:
    """A configuration of decoding: the one given, or a mapping of its fields, with these fields changed.

    Raises:
        ConfigError: something else, or fields that there are not, with the nearest one.
    """
    if config is None or isinstance(config, Mapping):
        return from_dict(cls, {**(config or {}), **options})
    if not isinstance(config, cls):
        raise ConfigError(f"config is {config!r}; it must be a {cls.__name__}, or a mapping of its fields")
    return from_dict(cls, {**to_dict(config), **options}) if options else config
