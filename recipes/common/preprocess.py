"""How samples are prepared: part of every saved model, so that whoever uses it repeats what training did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ...backbones.config import called, positive
from ...backbones.serialization import from_dict
from ...errors import CheckpointError, ConfigError, UnknownName
from ...modalities import read_details
from ...modalities.common.classifier import Classifier
from ...modalities.common.weights import CONFIG

P = TypeVar("P", bound="Preprocess")
# The longest side that a model sees, and the smallest part of an image that may be left of it.
LONGEST, SMALLEST = 4096, 0.05


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a file becomes what the model was trained on; saved with a run, so that predict repeats it.

    Args:
        classes: names, by index.
    """

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.classes:
            raise ConfigError("classes is empty; a classifier has at least one")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the details of a saved model."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[P], values: Any, file: str | Path = "the model") -> P:
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: other keys, or values that no input was prepared by; it names the file.
        """
        try:
            return from_dict(cls, values)
        except (ConfigError, UnknownName, TypeError, OverflowError) as error:
            raise CheckpointError(f"{file} does not say how its input was prepared: {error}") from error

    @classmethod
    def of_model(cls: type[P], folder: Path, model: Classifier) -> P:
        """What the model in a folder was trained on.

        Raises:
            CheckpointError: the folder does not say it, or says what no such model was trained on.
        """
        file = folder / CONFIG
        preprocess = cls.from_dict(read_details(folder).get("preprocess", {}), file)
        for name, (own, trained) in preprocess.told_twice(model).items():
            if own != trained:
                raise CheckpointError(f"{file}: details.preprocess: {name} is {own}, and the model has {trained}")
        return preprocess

    def told_twice(self, model: Classifier) -> dict[str, tuple[Any, Any]]:
        """What both this and a model say, by name, as it is here and there: these must be equal."""
        return {"number of classes": (len(self.classes), model.head.config.classes), **self.of_the_model(model)}

    def of_the_model(self, model: Classifier) -> dict[str, tuple[Any, Any]]:
        """What a model's own configuration says too: by name, as it is here and there."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one prepared input; where inputs may be of any length, of one of a second."""
        raise NotImplementedError

    def load(self, source: Any) -> Tensor:
        """What the model takes of a file."""
        raise NotImplementedError


def check_square(config: Any) -> None:
    """Raise ConfigError unless `size`, `channels` and `crop` of a configuration can be of square images."""
    positive(config, "size", most=LONGEST)
    if config.channels not in (1, 3):
        raise ConfigError(f"{called(config)}.channels is {config.channels}; it must be 1 (grey) or 3")
    if not SMALLEST <= config.crop <= 1:
        raise ConfigError(f"{called(config)}.crop is {config.crop}; it must be in [{SMALLEST}, 1]")


def check_statistics(config: Any) -> None:
    """Raise ConfigError unless `mean` and `std` of a configuration have a number each for all `channels`."""
    for name in ("mean", "std"):
        values = getattr(config, name)
        if len(values) != config.channels or not all(map(math.isfinite, values)):
            raise ConfigError(f"{called(config)}.{name} is {list(values)}; it must be {config.channels} finite numbers")
    if not all(value > 0 for value in config.std):
        raise ConfigError(f"{called(config)}.std is {list(config.std)}; each must be above 0")
