"""What every language-model objective is: a loss over token sequences, and the likelihood that it stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..config import ObjectiveConfig
from ..registry import Registry

if TYPE_CHECKING:
    from ..language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ObjectiveLoss:
    """What an objective says of a batch.

    Args:
        loss: to be minimised, a scalar with its history: the mean over the scored tokens and what is added to it.
        nats: −log p of the scored tokens, summed, or a bound of it; a scalar without history.
        count: how many tokens were scored.
        parts: what `loss` is made of, by name, without history.
    """

    loss: Tensor
    nats: Tensor
    count: int
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """−log p of sequences, in nats.

    Args:
        nats: one a sequence; float64, on the CPU.
        error: the standard error of each; None where `nats` is exact.
        samples: draws from which each value is estimated; 0 where it is exact.
        bound: whether the value is an upper bound on −log p in expectation (diffusion) and not −log p itself.
        greedy: whether every scored token is the model's most probable one; None where it was not asked for.
    """

    nats: Float[Tensor, " n"]
    error: Float[Tensor, " n"] | None = None
    samples: int = 0
    bound: bool = False
    greedy: Bool[Tensor, " n"] | None = None


class Objective(nn.Module, ABC):
    """What a language model is trained for.

    Attributes:
        decoder: which decoder generates text with such a model.
        extra_tokens: rows of the embedding beyond the vocabulary; never predicted. The first is the mask token.
    """

    decoder: ClassVar[Literal["autoregressive", "diffusion"]] = "autoregressive"
    extra_tokens: ClassVar[int] = 0

    @abstractmethod
    def check(self, model: LanguageModel) -> None:
        """Raise UnsupportedCall where a mixer of the model cannot serve this objective, with the remedy."""

    def anneal(self, step: int) -> None:
        """Say which training step, from 0, comes next; objectives that change while they train follow it."""

    @abstractmethod
    def loss(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "b t"],
        *,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
        counted: Bool[Tensor, "b t"] | None = None,
    ) -> ObjectiveLoss:
        """The loss of a batch of sequences. What is drawn at random is drawn from torch's global generator.

        Args:
            tokens: one sequence a row; or, with `cu_seqlens`, all of them concatenated in one row.
            cu_seqlens: 0, then the running total of the sequences' lengths.
            lengths: of rows that are filled up at their ends; None where all are full.
            counted: tokens that are scored; the others are given (prompts). None for all that can be.

        Raises:
            UnsupportedShape: no token is left to be scored.
        """

    @abstractmethod
    def log_likelihood(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "b t"],
        *,
        lengths: Int[Tensor, " b"] | None = None,
        counted: Bool[Tensor, "b t"] | None = None,
        samples: int = 32,
        seed: int = 0,
    ) -> Likelihood:
        """−log p of the counted tokens of each row given the others; see `loss` for the arguments.

        Args:
            samples: draws per sequence, where it is estimated.
            seed: of these draws.
        """


OBJECTIVES: Registry[Objective] = Registry("objective", base=ObjectiveConfig)
register_objective = OBJECTIVES.register
get_objective = OBJECTIVES.get


def list_objectives() -> list[str]:
    """Names of all registered objectives."""
    return OBJECTIVES.names()
