"""The options that the data sets of a recipe share: one object, in which a data set fills in its own defaults."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl

from ...backbones.config import bounded
from ...backbones.typed import Config
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataOptions(Config):
    """What every data set takes. An option that is None has the data set's own default.

    Args:
        batch_size: samples or sequences a step, on each device.
        workers: processes that read ahead; 0 for what lies in memory.
        seed: of the order and of what is random about a sample; a recipe passes its own.
        policy: what an unreadable file does: "skip" leaves it out and names it, "raise" stops.
    """

    called: ClassVar[str] = "data"

    batch_size: int | None = None
    workers: int | None = None
    seed: int | None = None
    policy: Literal["skip", "raise"] | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(DataOptions):
    """How the samples of an image, video or audio data set are loaded; see `DataOptions` for the rest.

    Args:
        max_unreadable: the fraction of the files read above which the run stops even with the policy "skip".
        keep: decode each file once, and keep what it holds in memory.
    """

    max_unreadable: float | None = None
    keep: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded(self, "max_unreadable", least=0, most=1, wanted="in [0, 1]")
        if self.keep and self.workers:
            raise ConfigError(
                f"data.keep with data.workers {self.workers}: each would keep all files; set workers to 0"
            )


def at_least(options: DataOptions, least: int, *names: str) -> None:
    """Raise ConfigError unless each named option is at least so large (or None)."""
    bounded(options, *names, least=least, wanted=f"at least {least}")


# Leaves every option to the data set.
LOADING = LoadingOptions()


class Reader(NamedTuple):
    """The data set that reads a folder or file.

    Args:
        data_set: its name.
        options: it takes, such as the path.
        configuration: the packaged one whose defaults suit it; None are the recipe's own.
    """

    data_set: str
    options: dict[str, Any]
    configuration: str | None = None


class RecipeData(pl.LightningDataModule):
    """Base of the recipes' data sets, which take the options that they share as one object.

    Attributes:
        defaults: what an option is that was left None.
        fixed: options that are never anything else, each with the reason.
        shuffled: whether training samples come in a new order each epoch.
    """

    defaults: ClassVar[DataOptions]
    fixed: ClassVar[dict[str, str]] = {}
    shuffled: bool = True

    @classmethod
    def reader_of(cls, path: Path) -> Reader:
        """What reads a folder or file of one's own.

        Raises:
            ConfigError: nothing does.
        """
        raise ConfigError(f"data is {str(path)!r}, and {cls.__name__} reads no folders or files; name a data set")

    @classmethod
    def filled(cls, given: DataOptions) -> Any:
        """The options with the data set's own defaults where they are None.

        Raises:
            ConfigError: an option that this data set does not take, or options that do not fit together.
        """
        set_ = {field.name: value for field in fields(given) if (value := getattr(given, field.name)) is not None}
        for name in set_.keys() - {field.name for field in fields(cls.defaults)}:
            raise ConfigError(f"data.{name} is {set_[name]!r}, and {cls.__name__} has no such option: leave it out")
        for name, reason in cls.fixed.items():
            own = getattr(cls.defaults, name)
            if set_.get(name, own) != own:
                raise ConfigError(
                    f"data.{name} is {set_[name]!r}; for {cls.__name__} it is always {own!r}, since {reason}: "
                    "leave it out"
                )
        return replace(cls.defaults, **set_)


def options_argument(data: type[RecipeData]) -> str:
    """The name of the argument by which a data set takes the shared options.

    Raises:
        ConfigError: it takes none.
    """
    for parameter in inspect.signature(data).parameters.values():
        if isinstance(parameter.default, DataOptions):
            return parameter.name
    options = type(data.defaults).__name__
    raise ConfigError(
        f"{data.__name__} does not take the options that data sets share; add an argument of the type {options}, by "
        f"default {options}(), to its constructor, and hand it on to that of {data.__mro__[1].__name__}"
    )
