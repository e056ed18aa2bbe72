"""Configurations of backbones: frozen dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import ConfigError
from .registry import entry_of, lookup
from .scan import scan_orders

# What a pattern's entry leaves to the backbone.
INHERIT = "inherit"


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Base of every mixer's options."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """Base of the options of feed-forward layers."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Base of the options of residual forms."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """Base of the options of what stands at the entrance of a stage."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Base of the options of a language model's objective."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where in a backbone a layer stands; some layers initialise by it.

    Args:
        layer: index of its block, from 0.
        depth: how many blocks there are.
        scan: the orders in which mixers with causal kernels run over the tokens; see scan.py.
        norm_eps: of every normalisation.
        earlier: types of the mixers and feed-forward layers in earlier blocks; the first of a kind may share what it
            computes.
    """

    layer: int = 0
    depth: int = 1
    scan: tuple[str, ...] = ("forward",)
    norm_eps: float = 1e-5
    earlier: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One entry of a pattern.

    Args:
        mixer: the sequence mixer: its configuration, its name, or names joined by "+", which run in parallel; None:
            the block has a feed-forward layer only.
        ffn: the feed-forward layer: its configuration or name; None: the block has a mixer only. By default the
            backbone's.
        residual: the residual form of both; by default the backbone's.
        scan: scan orders of the mixer; by default the backbone's.
        tie: blocks with the same name share their leaf modules, apart from what a part keeps per use.
    """

    mixer: MixerConfig | str | None = None
    ffn: FFNConfig | str | None = INHERIT
    residual: ResidualConfig | str = INHERIT
    scan: str = INHERIT
    tie: str | None = None

    def __post_init__(self) -> None:
        if self.mixer is None and self.ffn is None:
            raise ConfigError("a block needs a mixer or an ffn, and both are None")

    @staticmethod
    def of(entry: BlockConfig | str) -> BlockConfig:
        """An entry of a pattern from its short form: "gla", "attention+mamba2", "mamba2/moe", "none/mlp", "gla/none".

        Raises:
            UnknownName: no such mixer or feed-forward layer.
        """
        if not isinstance(entry, str):
            return entry
        mixer, slash, ffn = (part.strip() for part in entry.partition("/"))
        return BlockConfig(
            mixer=None if mixer == "none" else mixer, ffn=INHERIT if not slash else None if ffn == "none" else ffn
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of blocks of one width.

    Args:
        dim: width of its tokens.
        depth: number of blocks.
        pattern: mixers by name or blocks, tiled over the depth; by default the backbone's.
        residual: residual form of its blocks; by default the backbone's.
        transition: what stands at its entrance: its configuration or name; None where tokens enter unchanged.
    """

    dim: int
    depth: int
    pattern: tuple[str | BlockConfig, ...] | list[str | BlockConfig] = ()
    residual: ResidualConfig | str = INHERIT
    transition: TransitionConfig | str | None = None

    def __post_init__(self) -> None:
        positive(self, "dim")
        positive(self, "depth", most=DEEPEST)
        object.__setattr__(self, "pattern", checked_pattern(self.pattern, empty=True))
        if isinstance(self.transition, str):
            object.__setattr__(self, "transition", lookup(TransitionConfig, self.transition).config())


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A stack of blocks, in one stage or in several.

    Args:
        dim: width of the tokens that enter.
        depth: number of blocks; with `stages` their sum.
        pattern: mixers by name or `BlockConfig`s, tiled over the depth: `("gla", "gla", "gla", "attention")`. See
            `BlockConfig.of` for what a name may say.
        mixers: options by mixer name, for entries that are names; others have their defaults.
        ffn: the feed-forward layer of blocks that do not name their own: its configuration or name, or None.
        residual: the residual form: its configuration or name.
        scan: the set of scan orders for mixers with causal kernels: "forward" (the causal one), "both", "cross",
            "snake", "window", "hilbert", "temporal-first", "cross-3d", or several orders joined by commas.
        drop_path: stochastic depth, growing linearly from 0 to this rate in the last block.
        norm_eps: of every normalisation.
        norm: whether the last norm stands after the blocks.
        stages: several stretches of blocks; the backbone's own `pattern` is the default of theirs.
        inputs: names in `Context.shared` that the caller provides, for layers that read them.
    """

    dim: int
    depth: int
    pattern: tuple[str | BlockConfig, ...] | list[str | BlockConfig] = ("gla",)
    mixers: dict[str, MixerConfig] = field(default_factory=dict)
    ffn: FFNConfig | str | None = "swiglu"
    residual: ResidualConfig | str = "pre"
    scan: str = "forward"
    drop_path: float = 0.0
    norm_eps: float = 1e-5
    norm: bool = True
    stages: tuple[StageConfig, ...] | list[StageConfig] = ()
    inputs: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        positive(self, "dim", "norm_eps")
        positive(self, "depth", most=DEEPEST)
        fraction(self, "drop_path")
        object.__setattr__(self, "pattern", checked_pattern(self.pattern))
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        if self.stages and self.depth != sum(stage.depth for stage in self.stages):
            raise ConfigError(f"depth is {self.depth}; it must be the stages' sum, {sum(s.depth for s in self.stages)}")
        scan_orders(self.scan)
        self._check_mixers()
        # Names become configurations here, once.
        object.__setattr__(self, "ffn", configured(FFNConfig, self.ffn))
        object.__setattr__(self, "residual", configured(ResidualConfig, self.residual))
        _ = self.layers

    def _check_mixers(self) -> None:
        named: set[str] = set()
        for entry in (*self.pattern, *(entry for stage in self.stages for entry in stage.pattern)):
            mixer = BlockConfig.of(entry).mixer
            named |= set(mixer.split("+")) if isinstance(mixer, str) else set()
        for name, options in self.mixers.items():
            entry = lookup(MixerConfig, name)
            if not isinstance(options, entry.config):
                raise ConfigError(
                    f"mixers[{name!r}] is a {type(options).__name__}; it must be a {entry.config.__name__}"
                )
            if name not in named:
                raise ConfigError(
                    f"mixers has options for {name!r}, which the pattern does not name ({', '.join(sorted(named))})"
                )

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """What each block is, with nothing left to inherit: one entry per depth."""
        stages = self.stages or (StageConfig(dim=self.dim, depth=self.depth),)
        return tuple(
            self._resolved(pattern[i % len(pattern)], stage.residual)
            for stage in stages
            for pattern in [stage.pattern or self.pattern]
            for i in range(stage.depth)
        )

    def _resolved(self, entry: str | BlockConfig, residual: ResidualConfig | str) -> BlockConfig:
        entry = BlockConfig.of(entry)
        for own in (entry.residual, residual, self.residual):
            if own != INHERIT:
                residual = own
                break
        return BlockConfig(
            mixer=self._mixer(entry.mixer),
            ffn=configured(FFNConfig, self.ffn if entry.ffn == INHERIT else entry.ffn),
            residual=configured(ResidualConfig, residual),
            scan=self.scan if entry.scan == INHERIT else entry.scan,
            tie=entry.tie,
        )

    def _mixer(self, mixer: MixerConfig | str | None) -> MixerConfig | None:
        if not isinstance(mixer, str):
            return configured(MixerConfig, mixer)
        parts = tuple(self.mixers.get(name) or configured(MixerConfig, name) for name in mixer.split("+"))
        return parts[0] if len(parts) == 1 else lookup(MixerConfig, "parallel").config(parts=parts)

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Values as this version names them, from those that version 0.1 wrote."""
        if not {"channel", "channels"} & values.keys():
            return values
        values = dict(values)
        kind, options = values.pop("channel", "swiglu"), values.pop("channels", None) or {}
        values["ffn"] = None if kind is None else {"type": kind, **(to_plain(options.get(kind)) or {})}
        # What was said of mixers that the pattern does not name had no effect.
        named = {name for entry in values.get("pattern", ("gla",)) for name in entry.split("+")}
        values["mixers"] = {name: v for name, v in (values.get("mixers") or {}).items() if name in named}
        if "rwkv7" in named:
            # Values were each layer's own.
            values["mixers"]["rwkv7"] = {**to_plain(values["mixers"].get("rwkv7") or {}), "value_residual": False}
        return values


def to_plain(value: Any) -> Any:
    """Options that may be given as an object, as a dictionary."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def configured(base: type, given: Any) -> Any:
    """A configuration that derives from `base`: the one given, or the defaults of the part that is named; None is None.

    Raises:
        UnknownName: no part of that name.
        ConfigError: a configuration of something else.
    """
    if given is None:
        return None
    if isinstance(given, str):
        return lookup(base, given).config()
    if not isinstance(given, base):
        raise ConfigError(f"{given!r} is a {type(given).__name__}; it must be a name or a {base.__name__}")
    entry_of(given)
    return given


def resolved(entry: BlockConfig | str) -> BlockConfig:
    """An entry outside a pattern, for blocks inside wrappers: names become configurations, residual "pre"."""
    entry = BlockConfig.of(entry)
    return BlockConfig(
        mixer=configured(MixerConfig, entry.mixer),
        ffn=None if entry.ffn == INHERIT else configured(FFNConfig, entry.ffn),
        residual=configured(ResidualConfig, "pre" if entry.residual == INHERIT else entry.residual),
        scan=entry.scan,
        tie=entry.tie,
    )


def checked_pattern(pattern: Any, *, empty: bool = False) -> tuple[str | BlockConfig, ...]:
    """A pattern as a tuple.

    Raises:
        ConfigError: it is no list of names and blocks, or empty where it must not be.
    """
    if isinstance(pattern, str) or not (pattern or empty):
        raise ConfigError(f"pattern is {pattern!r}; it must be a list of mixer names, such as ['gla']")
    for entry in pattern:
        if not isinstance(entry, str | BlockConfig):
            raise ConfigError(f"pattern holds {entry!r}; its entries are mixer names or BlockConfigs")
    return tuple(pattern)


# The validators of fields refuse NaN, which compares with nothing, and sizes beyond all that is built: a number in a
# file must not be able to fill a machine.
LARGEST = 1 << 30
DEEPEST = 4096


def called(config: Any) -> str:
    """What messages call a configuration: what users write before its fields, or its class."""
    return getattr(config, "called", type(config).__name__)


def positive(config: Any, *names: str, most: int = LARGEST) -> None:
    """Raise ConfigError unless each named field is greater than 0 (or None), and at most `most`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value <= most:
            what = "greater than 0" if not value > 0 else f"at most {most:,}"
            raise ConfigError(f"{called(config)}.{name} is {value}; it must be {what}")


def not_negative(config: Any, *names: str, most: int = LARGEST) -> None:
    """Raise ConfigError unless each named field is 0 or greater (or None), and at most `most`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= most:
            what = "at least 0" if not value >= 0 else f"at most {most:,}"
            raise ConfigError(f"{called(config)}.{name} is {value}; it must be {what}")


def proportion(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is in (0, 1] (or None)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"{called(config)}.{name} is {value}; it must be in (0, 1]")


def fraction(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{called(config)}.{name} is {getattr(config, name)}; it must be in [0, 1)")


def divides(config: Any, name: str, total: int, what: str) -> None:
    """Raise ConfigError unless the named field divides `total`."""
    value = getattr(config, name)
    if value is not None and total % value:
        raise ConfigError(f"{type(config).__name__}.{name} is {value}; it must divide {what}, {total}")
