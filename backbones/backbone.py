"""The backbone: a pattern of blocks, tiled over the depth, in one stage or in several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, UnsupportedCall, UnsupportedShape
from ..utils.modes import autocast_enabled
from .block import Block, added
from .config import BackboneConfig, Site, StageConfig
from .context import Context, Memory, Shared, as_memory
from .layer import Capabilities, Output, SequenceLayer, unfit
from .layout import Layout
from .norm import RMSNorm
from .parameters import initialise, scale_residual_outputs
from .registry import build_part
from .scan import scan_orders
from .state import State
from .tie import SharingModule, tie_blocks

if TYPE_CHECKING:
    from .transition import Transition


class Backbone(SharingModule, SequenceLayer):
    """Blocks around any mixers, and a last norm; tokens in, tokens out.

    Its state holds how many tokens each sequence has read ("read"), and the states of its blocks and transitions.

    Example:
        >>> net = Backbone(BackboneConfig(dim=192, depth=12, pattern=["gla", "gla", "gla", "attention"]))
        >>> out = net(x, Layout(causal=True))                    # x and out.y: (b, t, 192)
        >>> out = net(x_next, Layout(causal=True), out.state)    # resumes after the first call

    Raises:
        ConfigError: a layer reads what no earlier layer writes and `config.inputs` does not name, or the blocks of a
            stage disagree on what their stream is.
    """

    blocks: Sequence[Block]
    transitions: MutableMapping[str, Transition]

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        # A plain backbone is one stage.
        self.stages = config.stages or (StageConfig(dim=config.dim, depth=config.depth),)
        self.checkpointing = False
        # What torch's containers hold, type checkers do not know.
        self.blocks = cast("Sequence[Block]", nn.ModuleList(self._blocks()))
        tie_blocks(self.blocks, [entry.tie for entry in config.layers])
        transitions = nn.ModuleDict(dict(self._transitions()))
        self.transitions = cast("MutableMapping[str, Transition]", transitions)
        self.norm = RMSNorm(self.stages[-1].dim, eps=config.norm_eps) if config.norm else nn.Identity()
        initialise(self)
        outputs = [layer for block in self.blocks for layer in block.residual_outputs()]
        scale_residual_outputs(outputs, sum(block.residual_branches() for block in self.blocks))
        self.capabilities, reads = self._joined()
        self._stateful = {name: block for name, block, layer in self._layers() if _keeps_state(layer)}
        # What is published for later layers though no layer writes it.
        self._published = frozenset(n for n in reads if n == "input" or n.startswith(("blocks.", "stages.")))

    def _blocks(self) -> Iterator[Block]:
        config, entries = self.config, enumerate(self.config.layers)
        for stage in self.stages:
            # Where a stage begins, tokens and width may change, which what was shared before does not follow.
            written: frozenset[str] = frozenset()
            for i, entry in islice(entries, stage.depth):
                orders = scan_orders(entry.scan)
                # The only block is the last one.
                rate = config.drop_path * (i / (config.depth - 1) if config.depth > 1 else 1)
                site = Site(layer=i, depth=config.depth, scan=orders, norm_eps=config.norm_eps, written=written)
                block = Block(stage.dim, entry, site, rate)
                written |= block.capabilities.writes
                yield block

    def _transitions(self) -> Iterator[tuple[str, nn.Module]]:
        dim, first = self.config.dim, 0
        for i, stage in enumerate(self.stages):
            if stage.transition is not None:
                site = Site(layer=first, depth=self.config.depth, norm_eps=self.config.norm_eps)
                yield str(i), build_part(stage.transition, dim, site, stage.dim)
            elif dim != stage.dim:
                raise ConfigError(f"stages[{i}].dim is {stage.dim}, and its tokens have {dim}; give it a transition")
            dim, first = stage.dim, first + stage.depth

    def _sections(self) -> Iterator[tuple[int, SequenceLayer | None, range]]:
        """Each stage's number, its transition and its blocks."""
        first = 0
        for i, stage in enumerate(self.stages):
            transition = self.transitions[str(i)] if str(i) in self.transitions else None
            yield i, transition, range(first, first + stage.depth)
            first += stage.depth

    def _layers(self) -> Iterator[tuple[str, int, SequenceLayer]]:
        """Every transition and block in order: its name, the number of the (next) block, and itself."""
        for i, transition, blocks in self._sections():
            if transition is not None:
                yield f"transitions.{i}", blocks.start, transition
            for j in blocks:
                yield f"blocks.{j}", j, self.blocks[j]

    def _joined(self) -> tuple[Capabilities, set[str]]:
        """What all layers can do, and all that they read; every reader must have a writer before it."""
        given = {"positions", "condition", *self.config.inputs}
        known, reads, layers = {"input", *given}, set(), []

        def follow(name: str, capabilities: Capabilities) -> None:
            if missing := sorted(capabilities.reads - known):
                raise ConfigError(
                    f"{name} reads {missing[0]!r}, which no earlier layer writes (known there: "
                    f"{', '.join(sorted(known))}); what the caller provides is named in BackboneConfig.inputs"
                )
            reads.update(capabilities.reads)
            known.update(capabilities.writes, [name])
            layers.append(capabilities)

        for i, transition, blocks in self._sections():
            if transition is not None:
                follow(f"transitions.{i}", transition.capabilities)
            streams = {residual.stream for j in blocks for _, residual, _ in self.blocks[j].parts()}
            if len(streams) > 1:
                raise ConfigError(
                    f"stages[{i}] mixes residual forms with different streams: {', '.join(sorted(streams))}"
                )
            for j in blocks:
                follow(f"blocks.{j}", self.blocks[j].capabilities)
            known.add(f"stages.{i}")
        return dataclasses.replace(Capabilities.joined(layers), reads=frozenset(reads & given)), reads

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Context | Layout | None = None,
        state: State | None = None,
        *,
        taps: Sequence[str] = (),
        depth: int | None = None,
    ) -> Output:
        """Mix the tokens; with a state, resume after the call that returned it.

        Args:
            x: tokens; none (t = 0) is legal.
            context: what is known of them; there is no default, since tokens may or may not see later ones.
            state: of the call before.
            taps: layers whose outputs are wanted in `shared`, before the last norm: "blocks.3", a tensor (b, t, d), or
                "stages.1", a `Memory` with the tokens "x" and their layout.
            depth: stop after so many blocks, the only ones that `taps` may then name; in a stage of another width than
                the last one's without the last norm.

        Returns:
            The tokens after the last norm, at `context.keep` where it is given; the state where the layout is causal;
            the losses of all layers; in `shared` what they wrote, and the taps.

        Raises:
            UnsupportedShape: `x` does not have this width, or does not fit the context or the state.
            UnsupportedCall: no context, a layout that asks a layer for what it does not declare, or a context that
                lacks an input.
        """
        depth = self._depth(depth)
        self._check_tokens(x)
        entered = self._entered(x, Context.of(context), state, depth)
        self._check_taps(taps, depth)
        run = _Pass(entered, state, self._published | set(taps), self.checkpointing and torch.is_grad_enabled())
        tokens = x
        run.publish("input", lambda: tokens)
        for i, transition, blocks in self._sections():
            if blocks.start >= depth:
                break
            if transition is not None:
                x = run(f"transitions.{i}", transition, x)
            x = self.blocks[blocks.start].first.open(x)
            last = blocks.start
            for last in blocks[: depth - blocks.start]:
                x = run(f"blocks.{last}", self.blocks[last], x)
                if run.wanted:
                    run.publish(f"blocks.{last}", partial(self.blocks[last].last.close, x))
            x = self.blocks[last].last.close(x)
            run.publish(f"stages.{i}", partial(as_memory, x, run.context))
        width = self.stages[-1].dim
        x, final = self.norm(x) if x.shape[-1] == width else x, run.context
        if final.keep is not None:
            x, final = final.take(final.keep, x)
        after = None
        if entered.layout.causal:
            read = entered.layout.lengths(tokens)
            after = State({"read": read if state is None else state["read"] + read, **run.states})
        return Output(x, after, run.losses, run.shared, None if final is entered else final)

    def _depth(self, depth: int | None) -> int:
        if depth is None:
            return self.config.depth
        if not 1 <= depth <= self.config.depth:
            raise ConfigError(f"depth is {depth}; it must be from 1 to {self.config.depth}, the backbone's own")
        return depth

    def _check_taps(self, taps: Sequence[str], depth: int) -> None:
        if not taps:
            return
        stages = [i for i, _, blocks in self._sections() if blocks.start < depth]
        known = [f"blocks.{i}" for i in range(depth)] + [f"stages.{i}" for i in stages]
        for tap in (taps,) if isinstance(taps, str) else taps:
            if isinstance(taps, str) or tap not in known:
                raise ConfigError(f"taps is {taps!r}; it must be a sequence of names out of {', '.join(known)}")

    def _check_state(self, x: Tensor, context: Context, state: State, depth: int) -> None:
        if not isinstance(state, State):
            raise UnsupportedShape(f"state is a {type(state).__name__}; it must be what an Output has as its `state`")
        sequences = context.layout.sequences(x.shape[0])
        if state.get("read") is None or state["read"].shape[0] != sequences:
            found = 0 if state.get("read") is None else state["read"].shape[0]
            raise UnsupportedShape(f"state holds {found} sequences, and the batch has {sequences}")
        if not self.capabilities.streaming:
            raise UnsupportedCall(
                f"{unfit(self, lambda can: can.streaming)} does not stream; call the backbone on the whole sequence"
            )
        for name, block in self._stateful.items():
            if name not in state and block < depth:
                raise UnsupportedShape(
                    f"state holds nothing of {name}; it is of another backbone, or of a call with another `depth`"
                )
        for name in state:
            if name != "read" and name not in self._stateful:
                raise UnsupportedShape(f"state holds {name}, which keeps none here; it is of another backbone")

    def _check_tokens(self, x: Tensor) -> None:
        dim = self.config.dim
        if not isinstance(x, Tensor):
            raise UnsupportedShape(f"x is a {type(x).__name__}; it must be a tensor (b, t, {dim})")
        if x.ndim != 3 or x.shape[-1] != dim:
            raise UnsupportedShape(f"x: shape {tuple(x.shape)} is not (b, t, {dim}), the backbone's tokens")
        if torch.compiler.is_compiling():
            return
        # Nearly always this is all there is to look at.
        first = next(self.parameters(), None)
        if first is None or x.dtype == first.dtype or (autocast_enabled(x.device.type) and x.dtype != torch.float64):
            return
        # Parts of a model may have another dtype than the rest.
        found = dict.fromkeys(p.dtype for p in self.parameters() if p.is_floating_point())
        if not x.is_floating_point() or (found and x.dtype not in found):
            wanted = next(iter(found), torch.float32)
            raise UnsupportedShape(
                f"x is {x.dtype}, and the weights are {wanted}; pass x.to({wanted}), or move the model to {x.dtype}"
            )

    def _entered(self, x: Tensor, context: Context, state: State | None, depth: int) -> Context:
        """The context, checked, with positions where a layer reads them."""
        context.check(x)
        if state is not None:
            self._check_state(x, context, state, depth)
        for name in self.capabilities.reads - {"positions"}:
            if name != "condition":
                context.read(name, "the backbone")
            elif context.condition is None:
                raise UnsupportedCall("the backbone is conditioned, and context.condition is None")
        if context.positions is None and "positions" in self.capabilities.reads:
            start = None if state is None else state["read"]
            return context.replace(positions=context.layout.positions(x, start))
        return context

    def init_state(
        self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state before the first token."""
        device = torch.device(device)
        if any(transition.primes for transition in self.transitions.values()):
            if "condition" in self.capabilities.reads:
                raise UnsupportedCall(
                    "the state after the learned tokens depends on the condition; call the backbone without a state"
                )
            return self(torch.zeros(batch, 0, self.config.dim, device=device, dtype=dtype), Layout()).state
        states: dict[str, Tensor | State] = {"read": torch.zeros(batch, device=device, dtype=torch.int64)}
        for name, _, layer in self._layers():
            own = layer.init_state(batch, device=device, dtype=dtype)
            if own is not None:
                states[name] = own
        return State(states)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again there."""
        self.checkpointing = enable


def _keeps_state(layer: SequenceLayer) -> bool:
    # What a transition that puts tokens of its own before the first one keeps, it has only after these.
    return (
        getattr(layer, "primes", False)
        or layer.init_state(1, device=torch.device("meta"), dtype=torch.float32) is not None
    )


class _Pass:
    """One pass through a backbone: what its layers have returned so far, and the context of the next one."""

    def __init__(self, context: Context, before: State | None, wanted: frozenset[str], checkpointing: bool):
        self.context, self.before, self.wanted, self.checkpointing = context, before, wanted, checkpointing
        self.states: dict[str, State] = {}
        self.losses: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor | Memory] = {}

    def __call__(self, name: str, layer: SequenceLayer, x: Tensor) -> Tensor:
        before = None if self.before is None else self.before.get(name)
        if self.checkpointing:
            out = checkpoint(layer, x, self.context, before, use_reentrant=False)
        else:
            out = layer(x, self.context, before)
        if out.state is not None:
            self.states[name] = out.state
        if out.losses:
            self.losses = added(self.losses, out.losses)
        if out.context is not None:
            self.context = out.context
        if out.shared:
            self._share(out.shared)
        return out.y

    def publish(self, name: str, value: Callable[[], Tensor | Memory]) -> None:
        """Share the value under `name` where anybody wants it."""
        if name in self.wanted:
            self._share({name: value()})

    def _share(self, more: Shared) -> None:
        self.shared.update(more)
        self.context = self.context.with_shared(more)
