"""Video data for the recipes: clips in files, and how they are prepared."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ConfigError, MediaError
from ...modalities.data.sources import VIDEO_SUFFIXES, Source, find_splits
from ...modalities.video.files import VideoReader
from ..common.loading import Key
from ..common.media import MediaData, Samples, named
from ..common.options import LoadingOptions, Reader, at_least
from ..vision.folders import Augment
from .preprocess import ClipConfig, VideoPreprocess

_CLIP = ClipConfig()
_AUGMENT = Augment(flip=False)
# How many files the usual duration is taken from.
_MEASURED = 16


class LoadVideo:
    """A sample from a video file, or from its frames: `video` (c, t, h, w), or (views, c, t, h, w).

    Args:
        preprocess: of held-out clips, and the normalisation of all.
        augment: augmentation of training clips, the same for all frames of a clip.
        views: clips at different times of a file.
        crops: squares along the longer side.
    """

    def __init__(self, preprocess: VideoPreprocess, augment: Augment | None = None, *, views: int = 1, crops: int = 1):
        self.preprocess, self.augment, self.views, self.crops = preprocess, augment, views, crops

    def __call__(self, media: Path | bytes | Tensor, seed: int | None) -> dict[str, Tensor]:
        prepare = self.preprocess
        if self.views * self.crops > 1:
            assert not isinstance(media, Tensor)  # what is kept of a file is one view
            return {"video": prepare.load_views(media, self.views, self.crops)}
        frames = media if isinstance(media, Tensor) else prepare.read(media, seed)
        if len(frames) > prepare.frames == 1:
            at = len(frames) // 2 if seed is None else seed % len(frames)
            frames = frames[at : at + 1]
        if seed is None or self.augment is None:
            return {"video": prepare.finish(prepare.squares(frames)[0])}
        return {"video": prepare.finish(self.augment(prepare.tinted(frames), prepare.size, seed))}


@dataclass(frozen=True, kw_only=True)
class VideoOptions(LoadingOptions):
    """What all video data sets take; see `LoadingOptions` for the rest. With `keep`, clips keep their central frames.

    Args:
        views: clips at different times of a file in a test, whose logits are averaged.
        crops: squares along the longer side, at each of these times.
    """

    views: int | None = None
    crops: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "views", "crops")


# Leaves every option to the data set.
LOADING = VideoOptions()


class VideoData(MediaData):
    """Base of the video data sets, whose batches have their clips (b, c, t, h, w) as `video`.

    Subclasses set `preprocess` in their constructor, and `sources` there or in `find`.

    Args:
        loading: the options that all video data sets share.
    """

    defaults: ClassVar[VideoOptions] = VideoOptions(
        **asdict(replace(MediaData.defaults, batch_size=16)), views=1, crops=1
    )
    preprocess: VideoPreprocess
    sources: dict[str, Source]
    # Augmentation of training clips. Not an argument: jsonargparse would pass a base's None to the chosen class.
    augment: Augment | None = None
    # FFmpeg has its own threads, which do not survive a fork.
    context = "forkserver"

    def __init__(self, *, loading: VideoOptions = LOADING):
        super().__init__(loading=loading)

    @classmethod
    def reader_of(cls, path: Path) -> Reader:
        if not path.is_dir():
            raise ConfigError(f"data is {str(path)!r}; name a folder of clips by class")
        return Reader("VideoFolderData", {"root": path}, "video_folder")

    @property
    def clips(self) -> tuple[int, int, int, int, int]:
        """Channels, frames, height and width of a clip, and the number of classes."""
        own = self.preprocess
        return own.channels, own.frames, own.size, own.size, self.classes

    def find(self) -> dict[str, Source]:
        """The sources of the splits."""
        return self.sources

    def setup(self, stage: str) -> None:
        sources = self.find()
        read = {split: self.kept(source, self.preprocess.central) for split, source in sources.items()}
        self.train_set = Samples(read["train"], LoadVideo(self.preprocess, self.augment), seed=self.loading.seed)
        self.val_set = Samples(read["val"], LoadVideo(self.preprocess))
        # What is kept of a file is one view.
        tested = "test" if "test" in sources else "val"
        views, crops = self.loading.views, self.loading.crops
        several = views * crops > 1
        many = LoadVideo(self.preprocess, views=views, crops=crops)
        self.test_set = Samples(sources[tested] if several else read[tested], many)

    def single_frames(self) -> SingleFrames:
        """One frame of each readable clip: a random one in training, the middle one otherwise."""
        return SingleFrames(self)


class SingleFrames(MediaData):
    """See `VideoData.single_frames`.

    Args:
        clips: set up and read before, so that its unreadable files are known.
    """

    defaults = VideoData.defaults
    context = VideoData.context

    def __init__(self, clips: VideoData):
        super().__init__(loading=replace(clips.loading, keep=False))
        self.preprocess = replace(clips.preprocess, frames=1, sampling="segments")
        augmented = LoadVideo(self.preprocess, clips.augment)
        train = Samples(clips.train_set.source, augmented, seed=self.loading.seed)
        val = Samples(clips.val_set.source, LoadVideo(self.preprocess))
        self.train_set, self.val_set = Readable(train, clips.unreadable), Readable(val, clips.unreadable)


class Readable:
    """Samples without those of unreadable files."""

    def __init__(self, samples: Samples, unreadable: Collection[str]):
        self.samples = samples
        self._indices = [i for i in range(len(samples)) if samples.source.name(i) not in unreadable]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        return self.samples[epoch, self._indices[index]]


class VideoFolderData(VideoData):
    """Your own clips, in any of the layouts of `find_source`: one folder a class (`root/train/CLASS/*.mp4`), tables as
    for Kinetics (`root/train.csv`) or tar shards (`root/train-*.tar`); the same with `val`, and perhaps `test`.

    Classes are those of the training clips.

    Args:
        root: the folder.
        clip: the clips that the model sees of a file.
        augment: augmentation of training clips. By default clips are not mirrored, since left and right are classes in
            many data sets.
        loading: the options that all video data sets share.
    """

    defaults = replace(VideoData.defaults, workers=2)

    def __init__(
        self,
        *,
        root: str,
        clip: ClipConfig = _CLIP,
        augment: Augment | None = _AUGMENT,
        loading: VideoOptions = LOADING,
    ):
        super().__init__(loading=loading)
        self.augment = augment
        self.sources = find_splits(Path(root), VIDEO_SUFFIXES)
        train = self.sources["train"]
        self.preprocess = VideoPreprocess(
            classes=train.classes,
            **asdict(clip),
            # ImageNet's statistics, which every public video model uses.
            mean=(0.485, 0.456, 0.406) if clip.channels == 3 else (0.449,),
            std=(0.229, 0.224, 0.225) if clip.channels == 3 else (0.226,),
            seconds=clip.frames / clip.rate if clip.sampling == "dense" else usual_duration(train),
        )


def usual_duration(source: Source) -> float:
    """The median duration of some readable files, in seconds.

    Raises:
        MediaError: none of them can be read; the message is the first one's.
    """
    durations: list[float] = []
    first: MediaError | None = None
    for index in range(0, len(source), max(1, len(source) // _MEASURED)):
        try:
            with VideoReader(source.media(index)) as video:
                durations.append(video.info.duration)
        except MediaError as error:
            first = first or MediaError(named(error, source.name(index)))
    if not durations:
        raise first or MediaError("there are no files")
    return statistics.median(durations)
