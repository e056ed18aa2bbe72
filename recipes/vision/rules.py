"""How the options of `vision_folder` follow from the images: few and small ones need another model than many.

Every choice is a function of the facts and of the options before it alone. The figures were chosen by the validation
splits of the data sets of `make showcase`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ...errors import ConfigError, MediaError
from ...modalities.data.sources import IMAGE_SUFFIXES, Source, find_splits
from ...modalities.image.files import image_header, load_image
from ...utils.options import cores
from ..common.media import MediaData
from ..common.options import RecipeData
from ..common.rules import Choice, Rule
from ..common.summary import DataSummary, summarise
from .folders import ImageFolderData

Values = Mapping[str, Any]
# Images whose size and colours are looked at.
_LOOKED = 256
# The largest side that is chosen for up to so many samples.
_SIDES = {2_000: 64, 20_000: 96, None: 128}
# Pillow's modes without colours.
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
# Optimizer steps after which a small model has learned what there is in a small set; and the most, without and with an
# accelerator.
_STEPS = (1500, 20_000, 300_000)
# Epochs of large sets, without and with an accelerator.
_EPOCHS = (10, 60)


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What is known of a folder of images.

    Args:
        classes, samples: of the training split.
        side: the median of the shorter sides.
        grey: whether no image has colours.
        cores: of this machine.
        accelerator: whether it has a GPU or another accelerator.
        summary: of all splits, where the data was looked at.
    """

    classes: int = 10
    samples: int = 1000
    side: int = 64
    grey: bool = False
    cores: int = 1
    accelerator: bool = False
    summary: DataSummary | None = None

    def notes(self) -> list[str]:
        """Lines on the data."""
        return [] if self.summary is None else self.summary.lines()


def image_facts(data: type[RecipeData], options: Mapping[str, Any]) -> ImageFacts:
    """The facts of a folder of images; nominal ones of another data set, and of what cannot be read: the data set says
    what is wrong with that."""
    try:
        sources = find_splits(str(options["root"]), IMAGE_SUFFIXES) if issubclass(data, ImageFolderData) else None
    except (KeyError, ConfigError, MediaError):
        sources = None
    if sources is None:
        return ImageFacts(cores=cores(), accelerator=torch.accelerator.is_available())
    sides, grey = _look(sources["train"])
    summary = summarise(sources)
    return ImageFacts(
        classes=summary.classes,
        samples=summary.samples["train"],
        side=round(median(sides)) if sides else ImageFacts.side,
        grey=grey,
        cores=cores(),
        accelerator=torch.accelerator.is_available(),
        summary=summary,
    )


def _look(source: Source) -> tuple[list[int], bool]:
    """The shorter sides of some images, and whether all of them are grey."""
    sides: list[int] = []
    grey = True
    for index in range(0, len(source), max(1, len(source) // _LOOKED)):
        try:
            height, width, mode = image_header(media := source.media(index))
            sides.append(min(height, width))
            if grey and mode not in _GREY:
                pixels = load_image(media, "RGB", keep_bytes=True)
                grey = bool((pixels == pixels[:1]).all())
        except MediaError:
            continue  # it is named when it is read
    return sides, grey and bool(sides)


def _side(facts: ImageFacts, values: Values) -> int:
    return values.get("data.size") or facts.side


def _batch(values: Values) -> int:
    # Data sets of others may leave it to their class.
    return values.get("data.loading.batch_size") or MediaData.defaults.batch_size or 1


def _steps(facts: ImageFacts, values: Values) -> int:
    """Optimizer steps of an epoch."""
    return max(1, facts.samples // _batch(values))


# From here on: one function an option.


def size(facts: ImageFacts, values: Values) -> Choice:
    """The images' own size, as far as there are enough of them to use it: twice the side is four times the time."""
    most = next(side for limit, side in _SIDES.items() if limit is None or facts.samples <= limit)
    if facts.side > most:
        return most, f"images have {facts.side} pixels along the shorter side; {facts.samples:,} of them need few"
    return max(8, -(-facts.side // 4) * 4), f"images have {facts.side} pixels along the shorter side"


def channels(facts: ImageFacts, values: Values) -> Choice:
    return (1, "no image has colours") if facts.grey else (3, "images have colours")


def augment(facts: ImageFacts, values: Values) -> Choice:
    """Gentle crops; mirrored where that keeps what a picture shows."""
    strength = {"scale": 0.5, "rotate": 15.0, "colour": 0.2}
    if facts.grey:
        return {**strength, "flip": False}, "grey images may be signs or letters: they are not mirrored"
    return {**strength, "flip": True}, "crops keep at least half of the area, so that most objects stay whole"


def stem(facts: ImageFacts, values: Values) -> Choice:
    return "conv", "overlapping convolutions need fewer samples than patches that are cut apart"


def stem_depth(facts: ImageFacts, values: Values) -> Choice:
    return 2, "residual blocks at each scale; with one, line drawings are learned more slowly"


def patch(facts: ImageFacts, values: Values) -> Choice:
    """A power of two with 7 to 15 patches along a side; fewer where the image is small."""
    side = 2
    pixels = _side(facts, values)
    while pixels // (2 * side) >= 7:
        side *= 2
    along = -(-pixels // side)
    return side, f"{along} x {along} tokens of an image of {pixels} pixels"


def dim(facts: ImageFacts, values: Values) -> Choice:
    return _by_samples(facts, {20_000: 128, 100_000: 192, None: 384}, "width")


def depth(facts: ImageFacts, values: Values) -> Choice:
    return _by_samples(facts, {20_000: 4, 100_000: 6, None: 12}, "depth")


def _by_samples(facts: ImageFacts, table: Mapping[int | None, Any], what: str) -> Choice:
    limit, value = next((n, value) for n, value in table.items() if n is None or facts.samples <= n)
    bound = f"up to {limit:,}" if limit else "many"
    return value, f"{what} for {bound} training samples; here {facts.samples:,}"


def drop_path(facts: ImageFacts, values: Values) -> Choice:
    shallow = (values["model.backbone.depth"] or 0) <= 6
    return (0.0, "blocks that are left out slow a shallow model down") if shallow else (0.1, "for a deep model")


def batch_size(facts: ImageFacts, values: Values) -> Choice:
    """Small sets need small batches to take enough steps in an epoch."""
    value = 16
    while value < 256 and facts.samples // (2 * value) >= 100:
        value *= 2
    return value, f"{max(1, facts.samples // value):,} steps an epoch"


def max_epochs(facts: ImageFacts, values: Values) -> Choice:
    """As many as take the steps that a small model needs; of large sets, what a machine can do in some hours."""
    each = _steps(facts, values)
    least, most = (_EPOCHS[1], _STEPS[2]) if facts.accelerator else (_EPOCHS[0], _STEPS[1])
    wanted = min(max(_STEPS[0], least * each), most)
    epochs = max(3, min(500, round(wanted / each)))
    where = "an accelerator" if facts.accelerator else "processors alone"
    return epochs, f"{epochs * each:,} steps of {each:,} an epoch, on {where}"


def lr(facts: ImageFacts, values: Values) -> Choice:
    """By the square root of the batch (arXiv 2205.10287), and inversely by the width (arXiv 2203.03466)."""
    batch, width = _batch(values), values["model.backbone.dim"]
    value = 1e-3 * (batch / 16) ** 0.5 * (128 / width)
    return float(f"{value:.2g}"), f"1e-3 at batches of 16 and width 128; here {batch} and {width}"


def weight_decay(facts: ImageFacts, values: Values) -> Choice:
    return 0.05, "of the matrices; usual for AdamW on images"


def label_smoothing(facts: ImageFacts, values: Values) -> Choice:
    return (0.1, "targets of 0.9 keep a model from certainty") if facts.classes > 2 else (0.0, "two classes")


def mixup(facts: ImageFacts, values: Values) -> Choice:
    return _mix(facts, values, 0.2)


def cutmix(facts: ImageFacts, values: Values) -> Choice:
    return _mix(facts, values, 1.0)


def _mix(facts: ImageFacts, values: Values, strength: float) -> Choice:
    epochs, few = values["trainer.max_epochs"], 100
    if epochs < few:
        return 0.0, f"{epochs} epochs are too few to overfit; mixed images would only slow them down"
    return strength, f"{epochs} epochs see each image often"


def ema(facts: ImageFacts, values: Values) -> Choice:
    """Averages over a twentieth of the run: where it is short, a fixed decay would keep the first weights."""
    each = _steps(facts, values)
    steps = each * max(1, values["trainer.max_epochs"])
    value = min(0.9999, max(0.9, 1 - 20 / steps))
    return float(f"{value:.4g}"), f"averages over the last {round(1 / (1 - value)):,} of {steps:,} steps"


def position_std(facts: ImageFacts, values: Values) -> Choice:
    return 0.02, "a convolutional stem sees where the edges are"


def workers(facts: ImageFacts, values: Values) -> Choice:
    few = facts.cores <= 2
    return (0, "no core is free for them") if few else (min(4, facts.cores - 2), f"{facts.cores} cores")


VISION_RULE = Rule(
    facts=image_facts,
    choices={
        "data.size": size,
        "data.channels": channels,
        "data.augment": augment,
        "model.stem": stem,
        "model.stem_depth": stem_depth,
        "model.patch": patch,
        "model.position_std": position_std,
        "model.backbone.dim": dim,
        "model.backbone.depth": depth,
        "model.backbone.drop_path": drop_path,
        "data.loading.batch_size": batch_size,
        "data.loading.workers": workers,
        "trainer.max_epochs": max_epochs,
        "model.training.lr": lr,
        "model.training.weight_decay": weight_decay,
        "model.training.label_smoothing": label_smoothing,
        "model.training.mixup": mixup,
        "model.training.cutmix": cutmix,
        "model.training.ema": ema,
    },
)
