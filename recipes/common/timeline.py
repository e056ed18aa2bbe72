"""Labels over time: consecutive segments, merged by what a model says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A stretch of time and what a model says of it.

    Args:
        start, stop: seconds.
        probabilities: of each class.
    """

    start: float
    stop: float
    probabilities: Float[Tensor, " classes"]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Moments one after the other of one class.

    Args:
        start, stop: seconds.
        label: index of the class.
        probability: of the class, on average over the moments.
        moments: how many.
    """

    start: float
    stop: float
    label: int
    probability: float
    moments: int = 1


def scenes(moments: Iterable[Moment]) -> Iterator[Scene]:
    """Moments one after the other of the same most probable class, merged; each as soon as another class follows.

    What an iterator gives is read no further than to there.
    """
    scene: Scene | None = None
    for moment in moments:
        probability, label = (value.item() for value in moment.probabilities.max(0))
        if scene is not None and scene.label == label:
            count = scene.moments + 1
            mean = scene.probability + (probability - scene.probability) / count
            scene = replace(scene, stop=moment.stop, probability=mean, moments=count)
            continue
        if scene is not None:
            yield scene
        scene = Scene(start=moment.start, stop=moment.stop, label=int(label), probability=probability)
    if scene is not None:
        yield scene
