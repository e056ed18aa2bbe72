"""Audio data for the recipes: sounds in files, and how they are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...backbones.config import not_negative
from ...errors import ConfigError
from ...modalities.data.sources import FolderSource, Source, check_classes, find_source, find_splits, read_utf8
from ..common.loading import uniform
from ..common.media import MediaData, Samples
from ..common.options import LOADING, LoadingOptions, Reader
from ..common.synthetic import MOST
from .preprocess import SUFFIXES, AudioPreprocess
from .sounds import RATE, SECONDS, SOUNDS, sounds_folder

# Files of Speech Commands that list what is held out, and its folder that is not a class.
_LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
_NO_CLASS = "_background_noise_"


@dataclass(frozen=True, kw_only=True)
class AudioAugment:
    """Augmentation of a training clip; the model itself masks spectrograms.

    Args:
        place: whether to crop or pad clips at a random place instead of the middle.
        shift: the largest shift in time, in seconds.
        gain: the largest change of loudness, in decibels.
        noise: signal-to-noise ratio of the loudest white noise, in decibels; ratios up to 40 decibels higher are
            equally likely. None adds no noise.
    """

    called: ClassVar[str] = "augment"

    place: bool = True
    shift: float = 0.0
    gain: float = 6.0
    noise: float | None = 15.0

    def __post_init__(self) -> None:
        not_negative(self, "shift", "gain")

    def __call__(self, wave: Float[Tensor, " n"], preprocess: AudioPreprocess, seed: int) -> Float[Tensor, " m"]:
        place, shift, gain, noise = uniform(seed, [(0, 0)], 4)[0].tolist()
        wave = preprocess.fit(wave, place) if self.place else preprocess.fit(wave)
        moved = round((2 * shift - 1) * self.shift * preprocess.rate)
        moved = max(-wave.shape[0] + 1, min(wave.shape[0] - 1, moved))
        if moved:
            wave = F.pad(wave, (moved, -moved))
        if self.noise is not None:
            # Against the loudest tenth of a second: the silence around a sound must not quieten the noise.
            power = F.avg_pool1d(
                wave.square()[None], min(wave.shape[0], max(1, preprocess.rate // 10)), ceil_mode=True
            ).amax()
            level = (power * 10 ** (-(self.noise + 40 * noise) / 10)).sqrt()
            generator = torch.Generator().manual_seed(seed)
            wave = wave + level * torch.randn(wave.shape, generator=generator)
        return wave * 10 ** ((2 * gain - 1) * self.gain / 20)


class LoadAudio:
    """A sample from a file with sound, or from its wave: `audio` (n,).

    Args:
        preprocess: of all clips.
        augment: augmentation of training clips.
    """

    def __init__(self, preprocess: AudioPreprocess, augment: AudioAugment | None = None):
        self.preprocess, self.augment = preprocess, augment

    def __call__(self, media: Path | bytes | Tensor, seed: int | None) -> dict[str, Float[Tensor, " n"]]:
        wave = media if isinstance(media, Tensor) else self.preprocess.read(media)
        if seed is None or self.augment is None:
            return {"audio": self.preprocess.fit(wave)}
        return {"audio": self.augment(wave, self.preprocess, seed)}


class Chosen:
    """A subset of a source, with class indices of its own."""

    def __init__(self, source: Source, indices: Sequence[int], classes: Sequence[str]):
        self.source, self.indices, self.classes = source, indices, tuple(classes)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        return self.classes.index(self.source.classes[self.source.label(self.indices[index])])

    def media(self, index: int) -> Path | bytes:
        return self.source.media(self.indices[index])


def listed_splits(root: Path) -> dict[str, Source]:
    """The splits of Speech Commands in its original layout: `root/CLASS/*.wav`, and lists of what is held out.

    Raises:
        ConfigError: a list names missing files, there are no files, or only one class.
    """
    everything = FolderSource(root, SUFFIXES)
    names = [Path(everything.name(i)).relative_to(root).as_posix() for i in range(len(everything))]
    held = {
        split: set(read_utf8(root / file).splitlines()) for split, file in _LISTS.items() if (root / file).is_file()
    }
    for split, files in held.items():
        missing = sorted(files - {"", *names})
        if missing:
            raise ConfigError(f"{_LISTS[split]} names {len(missing)} files that {str(root)!r} lacks: {missing[0]}, ...")
    classes = [name for name in everything.classes if name != _NO_CLASS]
    check_classes(classes, root)
    of = {name: split for split, files in held.items() for name in files}
    sides: dict[str, list[int]] = {split: [] for split in ("train", *held)}
    for index, name in enumerate(names):
        if everything.classes[everything.label(index)] != _NO_CLASS:
            sides[of.get(name, "train")].append(index)
    return {split: Chosen(everything, indices, classes) for split, indices in sides.items()}


class AudioData(MediaData):
    """Base of the audio data sets, whose batches have their waves as `audio`: (b, n), or a list of (n,).

    Subclasses set `preprocess` in their constructor, and return the sources of the splits in `find`.
    """

    preprocess: AudioPreprocess
    # Augmentation of training clips. Not an argument: jsonargparse would pass a base's None to the chosen class.
    augment: AudioAugment | None = None
    # FFmpeg has its own threads, which do not survive a fork.
    context = "forkserver"

    @classmethod
    def reader_of(cls, path: Path) -> Reader:
        if not path.is_dir():
            raise ConfigError(f"data is {str(path)!r}; name a folder of audio files by class")
        return Reader("AudioFolderData", {"root": path}, "audio_folder")

    @property
    def sounds(self) -> tuple[int, float | None, int]:
        """Samples a second, seconds of a clip, number of classes."""
        return self.preprocess.rate, self.preprocess.seconds, self.classes

    def find(self) -> dict[str, Source]:
        """The sources of the splits."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        for split, source in self.find().items():
            augment, seed = (self.augment, self.loading.seed) if split == "train" else (None, None)
            read = self.kept(source, self.preprocess.read)
            setattr(self, f"{split}_set", Samples(read, LoadAudio(self.preprocess, augment), seed=seed))

    def heard(self, samples: Samples) -> Samples:
        """The same samples without augmentation."""
        return Samples(samples.source, LoadAudio(self.preprocess))


class AudioFolderData(AudioData):
    """Your own audio files, in any of the layouts of `find_source`: one folder a class (`root/train/CLASS/*.wav`),
    tables (`root/train.csv`) or tar shards (`root/train-*.tar`); the same with `val`, and perhaps `test`. Or Speech
    Commands in its original layout: `root/CLASS/*.wav`, `root/validation_list.txt` and `root/testing_list.txt`.

    Classes are those of the training sounds.

    Args:
        root: the folder.
        rate: samples a second that files are resampled to.
        seconds: duration of the model's input: the middle of held-out clips, any part of training clips; null takes
            whole clips, packed without padding, which all mixers must support.
        augment: augmentation of training clips.
        loading: the options that all data sets share.
    """

    defaults = replace(AudioData.defaults, workers=2)

    def __init__(
        self,
        *,
        root: str,
        rate: int = 16_000,
        seconds: float | None = 1.0,
        augment: AudioAugment | None = AudioAugment(shift=0.1),
        loading: LoadingOptions = LOADING,
    ):
        super().__init__(loading=loading)
        if rate < 1 or (seconds is not None and not seconds > 0):
            raise ConfigError(f"data.rate is {rate} and data.seconds {seconds}; they must be above 0, or seconds null")
        self.augment = augment
        folder = Path(root)
        listed = (folder / _LISTS["val"]).is_file()
        self.sources = listed_splits(folder) if listed else find_splits(folder, SUFFIXES)
        self.preprocess = AudioPreprocess(classes=self.sources["train"].classes, rate=rate, seconds=seconds)

    def find(self) -> dict[str, Source]:
        return self.sources


class SoundsData(AudioData):
    """Vowels and notes whose class is their order, as wav and flac files, generated once and cached.

    Held-out sounds have other speakers and instruments than training sounds.

    Args:
        train: training sounds of each of the twelve classes.
        val: held-out sounds of each class.
        seconds: duration of the model's input, at least 1.2, that of the longest sound; null takes whole clips, packed.
        augment: augmentation of training sounds; None augments nothing.
        loading: batch_size and seed. The sounds are always the same, and lie in memory.
    """

    defaults = replace(AudioData.defaults, keep=True, policy="raise", max_unreadable=0.0)
    fixed = dict.fromkeys(("keep", "workers", "policy", "max_unreadable"), "its sounds are generated and lie in memory")

    def __init__(
        self,
        *,
        train: int = 150,
        val: int = 25,
        seconds: float | None = SECONDS,
        augment: AudioAugment | None = None,
        loading: LoadingOptions = LOADING,
    ):
        super().__init__(loading=loading)
        self.augment = augment
        for name, count in (("train", train), ("val", val)):
            if not 1 <= count <= MOST:
                raise ConfigError(f"data.{name} is {count}; it must be 1 to {MOST:,}")
        if seconds is not None and seconds < SECONDS:
            raise ConfigError(
                f"data.seconds is {seconds}; it must be at least {SECONDS}: a shorter part of a sound has no class"
            )
        self.counts = {"train": train, "val": val}
        self.preprocess = AudioPreprocess(classes=SOUNDS, rate=RATE, seconds=seconds)

    def prepare_data(self) -> None:
        # Once, where several processes train: the others wait.
        sounds_folder(**self.counts)

    def find(self) -> dict[str, Source]:
        folder = sounds_folder(**self.counts)
        return {split: find_source(folder, split, SUFFIXES, SOUNDS) for split in self.counts}
