"""Every named classifier of videos and of sounds as a timm model, `omnimix_<name>`.

`timm.create_model("omnimix_videomamba_tiny")` takes videos (b, c, t, h, w), and "omnimix_aum_tiny" waves (b, n).
`omnimix.timm_models` registers them.
"""

from __future__ import annotations

from typing import Any, Unpack, cast

from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv, generate_default_cfgs
from torch import Tensor

from ..backbones import BackboneConfig
from ..errors import ConfigError, UnsupportedCall
from ..modalities import AudioClassifier, AudioClassifierConfig, VideoClassifier, VideoClassifierConfig, model_config
from .timm_base import TimmModel, TimmShort, checkpoint_filter_fn, chosen, models_of, plain, pool_for, register

__all__ = ["TimmAudioClassifier", "TimmVideoClassifier"]

SECONDS = 10.24  # of AudioSet's clips, for which the named audio models learn positions


class TimmVideoClassifier(TimmModel, VideoClassifier):
    """A video classifier with timm's interface (see `TimmModel`).

    Videos of any length and size are served, whatever `num_frames` and `img_size` say.

    Args:
        cfg: a name from `omnimix.list_models()`.
        num_frames, img_size: the size that positions are learned for.
        patch_size: frames, and pixels down and across, of a tubelet.
        global_pool: "avg", "max", "token", or "" for none.
        class_token: "first" or "middle".
        num_frames, img_size, patch_size, global_pool, class_token: by default the named model's.
        backbone: a whole configuration in place of the named model's, or what JSON has of one.
        short: what differs from the named model's backbone; see `TimmShort`.

    Raises:
        UnknownName, ConfigError: as `omnimix.create_model`.
    """

    def __init__(
        self,
        cfg: str,
        *,
        num_classes: int = 400,
        in_chans: int = 3,
        num_frames: int | None = None,
        img_size: int | tuple[int, int] | list[int] | None = None,
        patch_size: tuple[int, int, int] | list[int] | None = None,
        global_pool: str | None = None,
        class_token: str | None = None,
        drop_rate: float = 0.0,
        backbone: BackboneConfig | dict[str, Any] | None = None,
        **short: Unpack[TimmShort],
    ):
        frames, *size = model_config(cfg).video.size
        if img_size is not None:
            size = (img_size, img_size) if isinstance(img_size, int) else img_size
        super().__init__(
            chosen(
                cfg,
                backbone,
                short,
                classes=num_classes,
                channels=in_chans,
                size=(frames if num_frames is None else num_frames, *size),
                tubelet=patch_size,
                pool=pool_for(global_pool),
                class_token=class_token,
                dropout=drop_rate,
            )
        )
        self.in_chans = in_chans
        self.adopt()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: tuple[int, int, int] | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Resize positions and, with `patch_size`, the tubelet's kernel."""
        frames, *size = self.tokenizer.config.size
        if img_size is not None:
            size = (img_size, img_size) if isinstance(img_size, int) else img_size
        frames, (height, width) = frames if num_frames is None else num_frames, size
        self.tokenizer.resize(size=(frames, height, width), tubelet=plain(patch_size))
        self.adopt()
        self.record_size((height, width), num_frames=frames, patch_size=self.tokenizer.config.tubelet)


class TimmAudioClassifier(TimmModel, AudioClassifier):
    """An audio classifier with timm's interface (see `TimmModel`), over waves (b, n) of any length.

    Lists of clips of several lengths are not served: timm's features are one tensor, a row a sample.

    Args:
        cfg: a name from `omnimix.list_models()`.
        in_chans: 1; the channels of a recording are mixed into one before.
        global_pool: "avg", "max", "token", or "" for none.
        class_token: "first" or "middle".
        global_pool, class_token: by default the named model's.
        backbone: a whole configuration in place of the named model's, or what JSON has of one.
        short: what differs from the named model's backbone; see `TimmShort`.

    Raises:
        UnknownName, ConfigError: as `omnimix.create_model`; another number of channels.
    """

    def __init__(
        self,
        cfg: str,
        *,
        num_classes: int = 527,
        in_chans: int = 1,
        global_pool: str | None = None,
        class_token: str | None = None,
        drop_rate: float = 0.0,
        backbone: BackboneConfig | dict[str, Any] | None = None,
        **short: Unpack[TimmShort],
    ):
        if in_chans != 1:
            raise ConfigError(f"in_chans is {in_chans}; audio models take one channel, so mix the others into it")
        super().__init__(
            chosen(
                cfg,
                backbone,
                short,
                classes=num_classes,
                pool=pool_for(global_pool),
                class_token=class_token,
                dropout=drop_rate,
            )
        )
        self.in_chans = in_chans
        self.adopt()

    def forward_features(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b t d"]:
        """See `TimmModel.forward_features`.

        Raises:
            UnsupportedCall: a list of clips.
        """
        if not isinstance(x, Tensor):
            raise UnsupportedCall("timm's models take clips of one length, (b, n); omnimix.create_model lists too")
        return super().forward_features(x)

    @property
    def num_prefix_tokens(self) -> int:
        patches = getattr(self.tokenizer.front, "patches", None)
        return 0 if patches is None else len(patches.extra(1))


def checkpoint_for_videos(state_dict: dict[str, Any], model: TimmVideoClassifier) -> dict[str, Tensor]:
    """`checkpoint_filter_fn`, and the tubelet's kernel for other channels, as timm adapts that of a patch."""
    weights = checkpoint_filter_fn(state_dict, model)
    kernel = weights["tokenizer.proj.weight"]
    if kernel.shape[1] != model.in_chans:
        flat = adapt_input_conv(model.in_chans, kernel.flatten(3), base_chans=kernel.shape[1])
        weights["tokenizer.proj.weight"] = flat.unflatten(3, kernel.shape[3:])
    return weights


def _video_cfg(config: VideoClassifierConfig) -> dict[str, Any]:
    _, height, width = cast("tuple[int, int, int]", config.video.size)
    return {
        # Of a frame: what timm's transforms make.
        "input_size": (config.video.channels, height, width),
        "num_classes": config.head.classes,
        "pool_size": None,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "tokenizer.proj",
        "classifier": "head.classifier",
        "fixed_input_size": False,
    }


def _audio_cfg(config: AudioClassifierConfig) -> dict[str, Any]:
    return {
        # As timm wants it, (channels, rows, columns); the models take (b, n).
        "input_size": (1, 1, round(config.audio.rate * SECONDS)),
        "num_classes": config.head.classes,
        "pool_size": None,
        "first_conv": None,
        "classifier": "head.classifier",
        "fixed_input_size": False,
    }


_videos, _sounds = models_of(VideoClassifierConfig), models_of(AudioClassifierConfig)
default_cfgs = generate_default_cfgs(
    {
        **{f"omnimix_{name}": _video_cfg(config) for name, config in _videos.items()},
        **{f"omnimix_{name}": _audio_cfg(config) for name, config in _sounds.items()},
    }
)
for _name in _videos:
    globals()[f"omnimix_{_name}"] = register(_name, TimmVideoClassifier, __name__, weights=checkpoint_for_videos)
for _name in _sounds:
    globals()[f"omnimix_{_name}"] = register(_name, TimmAudioClassifier, __name__)
