"""What the data of every modality shares: samples from any source, unreadable files, loaders that resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ...errors import MediaError
from ...modalities.data.sources import UNNAMED, Source
from ...utils.log import logger_of
from .loading import EpochLoader, Key, mix, own_key
from .options import LOADING, LoadingOptions, RecipeData
from .preprocess import Preprocess

logger = logger_of(__name__)
# By which inputs are normalised, where they are.
_STATISTICS = ("mean", "std")

# The label of samples that fill up a batch, so that every rank takes equally many: losses and metrics skip them.
IGNORED = -100
# Files after which the share of unreadable ones means something.
ENOUGH = 50


class Samples:
    """Samples of a source, decoded one by one.

    Args:
        source: says what there is and what it is.
        load: makes the tensors of a sample from a file or its bytes and a seed, which is None for held-out samples.
        seed: of the augmentation; None for held-out samples.
    """

    def __init__(
        self, source: Source | Kept, load: Callable[[Any, int | None], dict[str, Any]], *, seed: int | None = None
    ):
        self.source, self.load, self.seed = source, load, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, label = *own_key(key), IGNORED
        if key[1] >= 0:
            label = self.source.label(index)
        try:
            sample = self.load(self.source.media(index), None if self.seed is None else mix(self.seed, epoch, index))
        except MediaError as error:
            name = self.source.name(index)
            return {"label": label, "problem": (name, named(error, name))}
        return {**sample, "label": label, "problem": None}


def named(error: MediaError, name: str) -> str:
    """What an error says, with the sample's name: who decodes bytes does not know where they are from."""
    reason = str(error).replace(repr(UNNAMED), repr(name))
    return reason if name in reason else f"{name}: {reason}"


class Kept:
    """A source whose files are decoded once: what they hold stays in memory.

    Args:
        source: of files.
        read: decodes one.
    """

    def __init__(self, source: Source, read: Callable[[Path | bytes], Tensor]):
        self.source, self.read = source, read
        self.classes, self.name, self.label = source.classes, source.name, source.label
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.source)

    def media(self, index: int) -> Tensor:
        if index not in self._kept:
            self._kept[index] = self.read(self.source.media(index))
        return self._kept[index]


class MediaData(RecipeData):
    """Base of the data sets. A batch is a dict: the tensors of its samples, label (b,), problems [(file, reason)].

    Subclasses set `preprocess` when they are built and their three sets in `setup`; a set that is None does not exist.

    Args:
        loading: the options that all of them share; those that are None have the `defaults` of the class.
    """

    defaults: ClassVar[LoadingOptions] = LoadingOptions(
        batch_size=64, workers=0, seed=0, policy="skip", max_unreadable=0.1, keep=False
    )
    preprocess: Preprocess
    # How workers start; None is the system's way.
    context: str | None = None
    # Seconds after which workers that deliver nothing stop the run.
    timeout: float = 600.0

    def __init__(self, *, loading: LoadingOptions = LOADING):
        super().__init__()
        # Options, none of which is None any more: their types do not say that.
        self.loading: Any = self.filled(loading)
        self.unreadable: dict[str, str] = {}
        self._read, self._failed = 0, 0
        self.train_set: Any = None
        self.val_set: Any = None
        self.test_set: Any = None

    @property
    def classes(self) -> int:
        return len(self.preprocess.classes)

    def kept(self, source: Source, read: Callable[[Path | bytes], Tensor]) -> Source | Kept:
        """The source, or where told so one whose files are decoded once, by `read`."""
        return Kept(source, read) if self.loading.keep else source

    def _loader(self, dataset: Any, *, shuffle: bool) -> EpochLoader:
        return EpochLoader(
            dataset,
            batch_size=self.loading.batch_size,
            seed=self.loading.seed,
            shuffle=shuffle,
            workers=self.loading.workers,
            collate=None if hasattr(dataset, "__getitems__") else collate,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
            context=self.context,
            timeout=self.timeout,
        )

    def train_dataloader(self) -> EpochLoader:
        return self._loader(self.train_set, shuffle=self.shuffled)

    def val_dataloader(self) -> EpochLoader:
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> EpochLoader:
        """The test samples; the held-out ones where the data has no third split."""
        return self._loader(self.val_set if self.test_set is None else self.test_set, shuffle=False)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        # Here and not in the workers: only this process knows of all files, and an exception that a worker raises
        # arrives with its traceback in the message.
        problems = batch["problems"]
        for name, reason in problems:
            if self.loading.policy == "raise":
                raise MediaError(f"{reason} (data.policy 'skip' leaves such files out)")
            if name not in self.unreadable:
                self.unreadable[name] = reason
                logger.warning("skipped: %s (%s)", name, reason)
        self._read += len(batch["label"]) + len(problems)
        self._failed += len(problems)
        if self._failed > self.loading.max_unreadable * max(self._read, ENOUGH):
            first = next(iter(self.unreadable.values()))
            raise MediaError(
                f"{self._failed} of {self._read} files read cannot be used, more than data.max_unreadable, "
                f"{self.loading.max_unreadable:.0%}, allows; the first: {first}"
            )
        return batch if len(batch["label"]) else self._stand_in(problems)

    def _stand_in(self, problems: list[tuple[str, str]]) -> dict[str, Any]:
        """In place of a batch none of whose files can be read: a sample that can, and counts nowhere.

        An empty batch would leave the other ranks waiting for this one.
        """
        trainer = self.trainer
        held_out = self.test_set if trainer and trainer.testing and self.test_set is not None else self.val_set
        samples = self.train_set if trainer and trainer.training else held_out
        for index in range(len(samples)):
            sample = samples[0, -1 - index]
            if sample["problem"] is None:
                return {**collate([sample]), "problems": problems}
        raise MediaError(f"no file can be read, among them {problems[0][0]!r}")

    def state_dict(self) -> dict[str, Any]:
        # Those that a fit has taken over with weights are none of the data set's own.
        told = {name: list(getattr(self.preprocess, name)) for name in _STATISTICS if hasattr(self.preprocess, name)}
        return {"unreadable": dict(self.unreadable), **told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unreadable.update(state["unreadable"])
        told = {name: tuple(state[name]) for name in _STATISTICS if name in state}
        if any(getattr(self.preprocess, name) != value for name, value in told.items()):
            self.preprocess = replace(self.preprocess, **told)
            self.setup("fit")


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples: tensors of one shape are stacked, of several shapes listed."""
    good = [sample for sample in samples if sample["problem"] is None]
    names = [name for name in (good[0] if good else ()) if name not in ("label", "problem")]
    return {
        **{name: _stack([sample[name] for sample in good]) for name in names},
        "label": torch.tensor([sample["label"] for sample in good], dtype=torch.int64),
        "problems": [sample["problem"] for sample in samples if sample["problem"] is not None],
    }


def _stack(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    # In a worker torch's own way stacks them where the other process reads them, and saves a copy.
    return default_collate(tensors) if len({t.shape for t in tensors}) == 1 else tensors
