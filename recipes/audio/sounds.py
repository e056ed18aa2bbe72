"""Sounds whose class is the order of their parts, written once as wav and flac files.

Vowels by several speakers and notes by several instruments, put together in twelve ways. The classes come in groups
that contain the same parts in other orders, so that a model blind to order cannot distinguish the classes of a group:
five groups, hence at best 5 of 12 right.

Voiced sounds are sums of harmonics. For vowels, the strength of a harmonic is that of the glottal source, which falls
by 12 dB an octave, of the radiation from the lips, which rises by 6, and of the vocal tract there, a cascade of
resonators (Fant, Acoustic Theory of Speech Production, 1960): the steady state of a glottal pulse train after formant
filters, with formants that can glide.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...modalities.common.encode import write_audio
from ...utils.log import logger_of
from ..common.synthetic import generated_folder

logger = logger_of(__name__)

RATE = 16_000
SECONDS = 1.2  # none is longer
# Each with its reverse: other orders of vowels have other transitions, which single frames reveal.
SPEECH = ("a-i", "i-a", "e-u", "u-e", "a-o-u", "u-o-a")
MELODIES = ("low-mid-high", "high-mid-low", "mid-high-low", "low-high-mid")
TIMBRES = ("pluck-pipe", "pipe-pluck")
SOUNDS = SPEECH + MELODIES + TIMBRES
# The best accuracy without order: one of each group of classes with the same parts.
BLIND = len({tuple(sorted(name.split("-"))) for name in SOUNDS}) / len(SOUNDS)

# Hertz, men's averages: Peterson and Barney, "Control methods used in a study of the vowels", JASA 24 (1952), table II.
FORMANTS = {
    "a": (730.0, 1090.0, 2440.0),
    "e": (530.0, 1840.0, 2480.0),
    "i": (270.0, 2290.0, 3010.0),
    "o": (570.0, 840.0, 2410.0),
    "u": (300.0, 870.0, 2240.0),
}
# The fourth formant and all bandwidths: Klatt, "Software for a cascade/parallel formant synthesizer", JASA 67 (1980).
HIGH_FORMANT, BANDWIDTHS = 3500.0, (60.0, 90.0, 150.0, 250.0)

_STEP = 80  # samples between values of pitch and strength
_HARMONICS = 48
_FRAMES = round(SECONDS * RATE) // _STEP
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of the data.

    Args:
        name: "train" or "val".
        clips: of each class.
        voices: different speakers and players; those of two splits have nothing in common.
        seed: of everything.
    """

    name: str
    clips: int
    voices: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What is to sound: value by value, `_STEP` samples apart, for n clips.

    Args:
        pitch: hertz, (n, frames).
        strength: of each harmonic, (n, frames, harmonics).
    """

    pitch: Float[Array, "n frames"]
    strength: Float[Array, "n frames harmonics"]


def draw_sounds(name: str, split: Split) -> list[Float[Tensor, " samples"]]:
    """All clips of a class, of different lengths, within -1 .. 1.

    Args:
        name: one of SOUNDS.
        split: its `seed` alone decides what is sampled.
    """
    rng = np.random.default_rng([split.seed, SOUNDS.index(name)])
    n = split.clips
    voice = np.arange(n) % split.voices
    seconds = rng.uniform(0.45, 0.95, n)
    start = rng.uniform(0.02, SECONDS - 0.05 - seconds)
    parts = name.split("-")
    edges = start[:, None] + seconds[:, None] * _edges(rng, n, len(parts))
    draw = _speech if name in SPEECH else _notes
    waves = _sound(draw(rng, split, voice, parts, edges))
    waves /= waves.abs().amax(1, keepdim=True)
    noise = _noise(rng, n)
    # The power of the sound alone: with the silence around it, short sounds would have less noise.
    power = waves.square().sum(1) / torch.from_numpy(seconds * RATE)
    decibel = torch.from_numpy(rng.uniform(5, 30, n))
    noise *= (power / noise.square().mean(1) * 10 ** (-decibel / 10)).sqrt()[:, None]
    waves = waves + noise
    loudness = torch.from_numpy(rng.uniform(-20, -1, n))
    waves *= (10 ** (loudness / 20) / waves.abs().amax(1))[:, None]
    stop = np.minimum(SECONDS, start + seconds + rng.uniform(0.02, 0.3, n))
    return [wave[: int(end * RATE)].float() for wave, end in zip(waves, stop, strict=True)]


def write_sounds(folder: Path, splits: tuple[Split, ...]) -> None:
    """Write `folder/SPLIT/CLASS/VOICE_TAKE.wav`, every other file as `.flac`."""
    total = sum(split.clips for split in splits) * len(SOUNDS)
    logger.info("writing %s sounds into %s (once)", f"{total:,}", folder)
    for split in splits:
        for name in SOUNDS:
            (folder / split.name / name).mkdir(parents=True)
            for i, wave in enumerate(draw_sounds(name, split)):
                suffix = ("wav", "flac")[i % 2]
                file = folder / split.name / name / f"{i % split.voices:02d}_{i // split.voices}.{suffix}"
                write_audio(file, wave[None], RATE)


def sounds_folder(train: int, val: int) -> Path:
    """The folder with so many sounds of each class, `SPLIT/CLASS/VOICE_TAKE.wav` or `.flac`, made now where it is not
    in the user's cache yet."""
    splits = (
        Split(name="train", clips=train, voices=min(train, 40), seed=1),
        Split(name="val", clips=val, voices=min(val, 15), seed=2),
    )
    return generated_folder(f"sounds-{train}-{val}-v1", lambda folder: write_sounds(folder, splits))


def _edges(rng: np.random.Generator, n: int, parts: int) -> Float[Array, "n edges"]:
    """Where parts begin and end, 0 .. 1, (n, parts + 1): each part lasts from 0.7 to 1.3 of its share."""
    lengths = rng.uniform(0.7, 1.3, (n, parts))
    ends = np.cumsum(lengths, axis=1) / lengths.sum(1, keepdims=True)
    return np.concatenate([np.zeros((n, 1)), ends], axis=1)


def _times() -> Float[Array, "1 frames"]:
    return np.arange(_FRAMES)[None] * (_STEP / RATE)


def _ramp(x: Float[Array, "_ frames"], at: Float[Array, " n"], width: Float[Array, " n"]) -> Float[Array, "n frames"]:
    """0 before `at`, 1 after it, and half a cosine over `width` around it."""
    u = np.clip((x - at[:, None]) / width[:, None] + 0.5, 0, 1)
    return 0.5 - 0.5 * np.cos(np.pi * u)


def _pitch(
    rng: np.random.Generator, base: Float[Array, " n"], edges: Float[Array, "n edges"], glide: float
) -> Float[Array, "n frames"]:
    """A pitch that drifts up or down by at most `glide` semitones and wavers."""
    t, n = _times(), len(base)
    along = np.clip((t - edges[:, :1]) / (edges[:, -1:] - edges[:, :1]), 0, 1) - 0.5
    semitones = rng.uniform(-glide, glide, (n, 1)) * along
    waver = rng.uniform(0, 0.3, (n, 1)) * np.sin(2 * np.pi * (rng.uniform(3, 6, (n, 1)) * t + rng.random((n, 1))))
    return base[:, None] * 2 ** ((semitones + waver) / 12)


def _speech(
    rng: np.random.Generator,
    split: Split,
    voice: Int[Array, " n"],
    parts: list[str],
    edges: Float[Array, "n edges"],
) -> Score:
    """Vowels that glide into each other, by speakers with vocal tracts and pitches of their own."""
    n, t = len(voice), _times()
    people = np.random.default_rng([split.seed, 1000])
    # Women's formants are about 1.17 times, children's 1.3 times men's (Peterson and Barney); pitch goes along.
    tract = people.uniform(0.95, 1.3, split.voices)
    register = 120 * tract**2.6 * 2 ** people.uniform(-0.2, 0.2, split.voices)
    accent = 1 + people.uniform(-0.05, 0.05, (split.voices, len(FORMANTS), 3))
    tilt = people.uniform(4, 8, split.voices)
    pitch = _pitch(rng, register[voice] * 2 ** (rng.uniform(-3, 3, n) / 12), edges, 4.0)

    def formants(vowel: str) -> Float[Array, "n 4"]:
        own = np.array(FORMANTS[vowel]) * accent[voice, list(FORMANTS).index(vowel)]
        return np.log(np.concatenate([own, np.full((n, 1), HIGH_FORMANT)], axis=1) * tract[voice][:, None])

    centre = np.broadcast_to(formants(parts[0])[:, None], (n, _FRAMES, 4)).copy()
    for (before, after), at in zip(pairwise(parts), edges[:, 1:-1].T, strict=True):
        centre += _ramp(t, at, rng.uniform(0.04, 0.12, n))[..., None] * (formants(after) - formants(before))[:, None]
    hertz = pitch[..., None] * np.arange(1, _HARMONICS + 1)
    strength = (hertz / 100) ** (-tilt[voice] / 6.02)[:, None, None]
    for resonance, width in zip(np.moveaxis(np.exp(centre), -1, 0), BANDWIDTHS, strict=True):
        f2 = resonance[..., None] ** 2
        strength *= f2 / np.sqrt((f2 - hertz**2) ** 2 + (width * tract[voice][:, None, None] * hertz) ** 2)
    fade = rng.uniform(0.02, 0.06, (2, n))
    loud = _ramp(t, edges[:, 0], fade[0]) * (1 - _ramp(t, edges[:, -1], fade[1]))
    return Score(pitch=pitch, strength=strength * loud[..., None])


def _notes(
    rng: np.random.Generator,
    split: Split,
    voice: Int[Array, " n"],
    parts: list[str],
    edges: Float[Array, "n edges"],
) -> Score:
    """Notes of three heights by one instrument, or of one height by two."""
    n, t = len(voice), _times()
    players = np.random.default_rng([split.seed, 2000])
    base = 2 ** players.uniform(np.log2(180), np.log2(340), split.voices)[voice] * 2 ** (rng.uniform(-2, 2, n) / 12)
    interval = rng.integers(3, 6, (2, n))
    height = {"low": np.zeros(n), "mid": interval[0], "high": interval.sum(0)}
    kind = rng.random(n) < 0.5
    numbers = np.arange(1, _HARMONICS + 1)
    slope = players.uniform((0.9, 1.6), (1.5, 2.6), (split.voices, 2))[voice]
    hollow = players.uniform(0.1, 0.7, split.voices)[voice][:, None]
    even = np.where(numbers % 2 == 0, hollow, 1.0)
    spread = numbers[None, :] ** -slope[:, :1]
    pluck, pipe = spread, even * numbers[None, :] ** -slope[:, 1:]
    decay, damping = rng.uniform(3, 9, n), rng.uniform(0.05, 0.3, n)
    steady = _pitch(rng, base, edges, 0.5)
    pitch, strength = steady.copy(), np.zeros((n, _FRAMES, _HARMONICS))
    for part, first, last in zip(parts, edges[:, :-1].T, edges[:, 1:].T, strict=True):
        since = t - first[:, None]
        inside = (since >= 0) & (t < last[:, None])
        plucked = np.full(n, part == "pluck") if part in ("pluck", "pipe") else kind
        if part in height:
            pitch = np.where(since >= 0, steady * 2 ** (height[part][:, None] / 12), pitch)
        # Higher harmonics of a string die sooner.
        rate = decay[:, None] * (1 + damping[:, None] * (numbers - 1))
        struck = np.exp(-np.clip(since, 0, None)[..., None] * rate[:, None]) * pluck[:, None]
        blown = (_ramp(t, first + 0.03, np.full(n, 0.06)) * 0.7)[..., None] * pipe[:, None]
        end = (1 - _ramp(t, last - 0.01, np.full(n, 0.02))) * _ramp(t, first + 0.003, np.full(n, 0.006))
        note = np.where(plucked[:, None, None], struck, blown) * (end * inside)[..., None]
        strength += note
    return Score(pitch=pitch, strength=strength)


def _sound(score: Score) -> Float[Tensor, "n samples"]:
    """The sum of the harmonics.

    sin(k x) follows from the two before it, 2 cos(x) sin((k - 1) x) - sin((k - 2) x): two products a sample and
    harmonic instead of a sine.
    """
    frames, harmonics = score.strength.shape[1:]
    # Nothing above half the rate, where it would come back as another pitch.
    heard = score.strength * (score.pitch[..., None] * np.arange(1, harmonics + 1) < 0.47 * RATE)

    def smooth(values: Float[Array, "n frames"]) -> Float[Tensor, "n samples"]:
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return F.interpolate(tensor[:, None], size=frames * _STEP, mode="linear", align_corners=False)[:, 0]

    turns = torch.cumsum(smooth(score.pitch).double() / RATE, dim=1)
    angle = (2 * np.pi * (turns % 1)).float()
    double, before, now = 2 * torch.cos(angle), torch.zeros_like(angle), torch.sin(angle)
    wave = torch.zeros_like(angle)
    for k in range(harmonics):
        wave += smooth(heard[..., k]) * now
        before, now = now, double * now - before
    return wave.double()


def _noise(rng: np.random.Generator, n: int) -> Float[Tensor, "n samples"]:
    """Noise whose power falls with frequency, from not at all to as fast as the frequency rises."""
    samples = _FRAMES * _STEP
    spectrum = np.fft.rfft(rng.standard_normal((n, samples)), axis=1)
    rise = np.maximum(np.arange(spectrum.shape[1]), samples * 50 / RATE) ** -rng.uniform(0, 0.5, (n, 1))
    return torch.from_numpy(np.fft.irfft(spectrum * rise, n=samples, axis=1))
