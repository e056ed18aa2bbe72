"""Configurations of backbones: frozen dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from ..errors import ConfigError
from .registry import entry_of, lookup, required
from .scan import rename_scan, scan_orders, with_current_scan
from .typed import Config

# What a pattern's entry leaves to the backbone.
INHERIT = "inherit"


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """Base of every mixer's options."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class FFNConfig(Config):
    """Base of the options of feed-forward layers."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(Config):
    """Base of the options of residual forms."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class TransitionConfig(Config):
    """Base of the options of what stands at the entrance of a stage."""

    type: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
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
        written: names in `Context.shared` that earlier blocks of the stage write; the first layer may share its own.
    """

    layer: int = 0
    depth: int = 1
    scan: tuple[str, ...] = ("forward",)
    norm_eps: float = 1e-5
    written: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
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
    upgrade = staticmethod(with_current_scan)

    def __post_init__(self) -> None:
        rename_scan(self)
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
        if not all(name.strip() for name in mixer.split("+")) or (slash and not ffn):
            raise ConfigError(f"pattern has {entry!r}, where a name is missing; write 'gla', 'gla+mamba2' or 'gla/moe'")
        return BlockConfig(
            mixer=None if mixer == "none" else mixer, ffn=INHERIT if not slash else None if ffn == "none" else ffn
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
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
        object.__setattr__(self, "transition", configured(TransitionConfig, self.transition))


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """A stack of blocks, in one stage or in several.

    Args:
        dim: width of the tokens that enter.
        depth: number of blocks; with `stages` their sum.
        pattern: mixers by name or `BlockConfig`s, tiled over the depth: `("gla", "gla", "gla", "attention")`. See
            `BlockConfig.of` for what a name may say.
        mixers: options by mixer name, for entries of the pattern that are names; others have their defaults. A wrapper
            in the pattern holds the configurations of its parts itself.
        ffn: the feed-forward layer of blocks that do not name their own: its configuration or name, or None.
        residual: the residual form: its configuration or name.
        scan: the set of scan orders for mixers with causal kernels: "forward" (the causal one), "bidirectional",
            "cross", "snake", "window", "hilbert", "temporal-first", "cross-3d", or several orders joined by commas.
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
        if not self.pattern:
            raise ConfigError("pattern is (); it must be a list of mixer names, such as ['gla']")
        if self.stages and self.depth != sum(stage.depth for stage in self.stages):
            raise ConfigError(f"depth is {self.depth}; it must be the stages' sum, {sum(s.depth for s in self.stages)}")
        rename_scan(self)
        self._check_mixers()
        # Names become configurations here, once.
        object.__setattr__(self, "ffn", configured(FFNConfig, self.ffn))
        object.__setattr__(self, "residual", configured(ResidualConfig, self.residual))
        self._check_used(self.layers)

    def _check_mixers(self) -> None:
        named: set[str] = set()
        for entry in (*self.pattern, *(entry for stage in self.stages for entry in stage.pattern)):
            mixer = BlockConfig.of(entry).mixer
            named |= set(mixer.split("+")) if isinstance(mixer, str) else set()
        for name, options in self.mixers.items():
            entry = lookup(MixerConfig, name)
            if not isinstance(options, entry.config):
                kind = type(options).__name__
                raise ConfigError(f"mixers[{name!r}] is a {kind}; it must be a {entry.config.__name__}")
            if name not in named:
                raise ConfigError(
                    f"mixers has options for {name!r}, which the pattern does not name ({', '.join(sorted(named))})"
                )

    def _check_used(self, layers: tuple[BlockConfig, ...]) -> None:
        """Refuse what no block uses, unless it is the default or says the same as the blocks."""
        used = {
            "ffn": (FFNConfig, "swiglu", [layer.ffn for layer in layers]),
            "residual": (ResidualConfig, "pre", [layer.residual for layer in layers]),
        }
        for name, (base, default, own) in used.items():
            value = getattr(self, name)
            if value is not None and value != configured(base, default) and value not in own:
                raise ConfigError(
                    f"{name} is {value!r}, which no block uses: each names its own; leave {name} out, or a block's"
                )
        if self.stages and all(stage.pattern for stage in self.stages) and self.pattern != ("gla",):
            raise ConfigError(f"pattern is {self.pattern!r}, and each stage has its own; leave one of them out")
        _check_scan("scan", self.scan, [layer for layer in layers if layer.scan == self.scan])
        if self.drop_path and not any(entry_of(layer.residual).build.drops for layer in layers):
            kinds = sorted({entry_of(layer.residual).name for layer in layers})
            raise ConfigError(
                f"drop_path is {self.drop_path}, and no block can skip its layers with the residual form "
                f"{' and '.join(map(repr, kinds))}; leave it out, or choose another form, such as 'pre'"
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
        block = BlockConfig(
            mixer=self._mixer(entry.mixer),
            ffn=configured(FFNConfig, self.ffn if entry.ffn == INHERIT else entry.ffn),
            residual=configured(ResidualConfig, residual),
            scan=self.scan if entry.scan == INHERIT else entry.scan,
            tie=entry.tie,
        )
        if entry.scan != INHERIT:
            _check_scan("BlockConfig.scan", entry.scan, [block])
        return block

    def _mixer(self, mixer: MixerConfig | str | None) -> MixerConfig | None:
        if not isinstance(mixer, str):
            return configured(MixerConfig, mixer)
        parts = tuple(self.mixers.get(name) or configured(MixerConfig, name) for name in mixer.split("+"))
        return parts[0] if len(parts) == 1 else lookup(MixerConfig, "parallel").config(parts=parts)

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Values as this version names them, from those that version 0.1 wrote."""
        values = with_current_scan(values)
        if not {"channel", "channels"} & values.keys():
            return values
        values = dict(values)
        kind, options = values.pop("channel", "swiglu"), values.pop("channels", None) or {}
        values["ffn"] = None if kind is None else {"type": kind, **(to_plain(options.get(kind)) or {})}
        # What was said of mixers that the pattern does not name had no effect.
        named = {name for entry in values.get("pattern", ("gla",)) for name in entry.split("+")}
        values["mixers"] = {name: v for name, v in (values.get("mixers") or {}).items() if name in named}
        if values.get("scan", "forward") != "forward" and not any(lookup(MixerConfig, n).build.scans for n in named):
            values["scan"] = "bidirectional"
        if "rwkv7" in named:
            own = to_plain(values["mixers"].get("rwkv7") or {})
            values["mixers"]["rwkv7"] = rwkv7_of_v01(values["dim"], own)
        return values


def rwkv7_of_v01(dim: int, options: dict[str, Any]) -> dict[str, Any]:
    """The options of RWKV-7 with the ranks that version 0.1 had by default; values were each layer's own there."""
    narrow, wide = (max(32, round(rank / 32) * 32) for rank in (1.8 * dim**0.5, 0.6 * dim**0.8))
    given = {name: value for name, value in options.items() if value is not None}
    return {"decay_rank": narrow, "rate_rank": narrow, "gate_rank": wide, **given, "value_residual": False}


def scanning(part: Any) -> bool:
    """Whether a block, a mixer or a part of it runs in the orders of a scan."""
    if isinstance(part, BlockConfig):
        if isinstance(part.mixer, str):
            return any(lookup(MixerConfig, name).build.scans for name in part.mixer.split("+"))
        return scanning(part.mixer)
    if not isinstance(part, MixerConfig):
        return False
    inner = [one for value in vars(part).values() for one in (value if isinstance(value, tuple) else (value,))]
    return entry_of(part).build.scans or any(map(scanning, inner))


def _check_scan(name: str, scan: str, blocks: list[BlockConfig]) -> None:
    """Raise ConfigError where none of the blocks runs in orders that say more than whether it is causal."""
    directions = (("forward",), ("forward", "backward"))
    if scan_orders(scan) not in directions and not any(map(scanning, blocks)):
        raise ConfigError(
            f"{name} is {scan!r}, and no mixer that it is for runs in the orders of a scan; leave it out, set "
            "'bidirectional', or choose a mixer with a causal kernel, such as 'gla'"
        )


def to_plain(value: Any) -> Any:
    """Options that may be given as an object, as a dictionary."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def configured(base: type, given: Any) -> Any:
    """A configuration that derives from `base`: the one given, or the defaults of the part that is named; None is None.

    Raises:
        UnknownName: no part of that name.
        ConfigError: a configuration of something else, or the name of a part whose options have no defaults.
    """
    if given is None:
        return None
    if isinstance(given, str):
        config = lookup(base, given).config
        if missing := required(config):
            raise ConfigError(f"{given!r} needs {', '.join(missing)}; pass {config.__name__}({missing[0]}=...) instead")
        return config()
    if not isinstance(given, base):
        raise ConfigError(f"{given!r} is a {type(given).__name__}; it must be a name or a {base.__name__}")
    entry_of(given)
    return given


def bounded(
    config: Any,
    *names: str,
    least: float | int = -math.inf,
    above: float | int = -math.inf,
    most: float | int = math.inf,
    below: float | int = math.inf,
    wanted: str = "a finite number",
) -> None:
    """Raise ConfigError unless each named field is a finite number within the bounds (or None).

    Args:
        config: whose fields they are.
        names: of the fields.
        least, above: the lower bound, included or excluded.
        most, below: the upper bound, included or excluded.
        wanted: what the message says that the value must be.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        # NaN compares with nothing, and would pass where a comparison refuses.
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and value <= most and value < below) or value < least or value <= above:
            raise ConfigError(f"{called(config)}.{name} is {value!r}; it must be {wanted}")


# A number in a file must not be able to fill a machine.
LARGEST = 1 << 30
DEEPEST = 4096


def called(config: Any) -> str:
    """What messages call a configuration: what users write before its fields, or its class."""
    return getattr(config, "called", type(config).__name__)


def positive(config: Any, *names: str, most: int = LARGEST) -> None:
    """Raise ConfigError unless each named field is a finite number greater than 0 (or None), and at most `most`."""
    bounded(config, *names, above=0, wanted="greater than 0 and finite")
    bounded(config, *names, most=most, wanted=f"at most {most:,}")


def not_negative(config: Any, *names: str, most: int = LARGEST) -> None:
    """Raise ConfigError unless each named field is a finite number of at least 0 (or None), and at most `most`."""
    bounded(config, *names, least=0, wanted="at least 0 and finite")
    bounded(config, *names, most=most, wanted=f"at most {most:,}")


def proportion(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is in (0, 1] (or None)."""
    bounded(config, *names, above=0, most=1, wanted="in (0, 1]")


def fraction(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field lies in [0, 1)."""
    bounded(config, *names, least=0, below=1, wanted="in [0, 1)")


def divides(config: Any, name: str, total: int, what: str) -> None:
    """Raise ConfigError unless the named field, a number above 0, divides `total`."""
    value = getattr(config, name)
    if value is not None and total % value:
        raise ConfigError(f"{called(config)}.{name} is {value}; it must divide {what}, {total}")
