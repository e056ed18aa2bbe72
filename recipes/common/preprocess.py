"""How samples are prepared: part of every saved model, so that whoever uses it repeats what training did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ...errors import CheckpointError

P = TypeVar("P", bound="Preprocess")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a file becomes what the model was trained on; saved with a run, so that predict repeats it.

    Args:
        classes: names, by index.
    """

    classes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the details of a saved model."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[P], values: dict[str, Any]) -> P:
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: other keys.
        """
        try:
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        except TypeError as error:
            raise CheckpointError(f"the model does not say how its input was prepared: {error}") from error
