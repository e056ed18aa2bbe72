"""What users would take instead of our kernels, on the same arguments, for `omnimix bench kernels`.

Each peer is timed in a process of its own: some packages change how others behave once they are imported.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..kernels.registry import Arguments, Draw, get_op

Inputs = dict[str, Any]
# Beyond this a peer that walks step by step would take most of the time of the whole table.
STEPWISE_STEPS = 2048


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A function of another package that computes what one of our ops does.

    Args:
        name: as the table shows it.
        op: ours.
        package: what must be installed.
        load: imports it and gives the function.
        adapt: our arguments as the peer's, or None where it does not serve them.
        longest: the most steps for which it is timed; None is all.
    """

    name: str
    op: str
    package: str
    load: Callable[[], Callable[..., Any]]
    adapt: Callable[[Arguments], Inputs | None]
    longest: int | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _pick(a: Arguments, **names: str) -> Inputs:
    return {theirs: a[ours] for theirs, ours in names.items()}


def _ungrouped(a: Arguments) -> bool:
    return a["q"].shape[2] == a["v"].shape[2]


def _decay_dims(a: Arguments) -> int:
    decay = a.get("decay")
    return 0 if decay is None else decay.dim()


def _scalar_decay(a: Arguments) -> Inputs | None:
    fits = _decay_dims(a) == 3 and _ungrouped(a) and a.get("bonus") is None
    return _pick(a, q="q", k="k", v="v", g="decay") if fits else None


def _channel_decay(a: Arguments) -> Inputs | None:
    fits = _decay_dims(a) == 4 and _ungrouped(a) and a.get("bonus") is None
    return _pick(a, q="q", k="k", v="v", gk="decay") if fits else None


def _delta(decay_dims: int) -> Callable[[Arguments], Inputs | None]:
    def adapt(a: Arguments) -> Inputs | None:
        # A removal key of its own is as much work as k in its place, which is all that these peers know.
        fits = a.get("beta") is not None and _decay_dims(a) == decay_dims
        if not fits or not _ungrouped(a):
            return None
        if decay_dims:
            return _pick(a, q="q", k="k", v="v", g="decay", beta="beta")
        # Heads before time.
        return {name: a[name].transpose(1, 2).contiguous() for name in ("q", "k", "v", "beta")}

    return adapt


def _rank_one(a: Arguments) -> Inputs | None:
    if a.get("a") is None or not _ungrouped(a):
        return None
    names = {"q": "q", "k": "k", "v": "v", "alpha": "b", "beta": "a", "gk": "decay"}
    return {theirs: a[ours].transpose(1, 2).contiguous() for theirs, ours in names.items()}


def _fla(name: str, op: str, module: str, function: str, adapt: Callable, longest: int | None = None) -> Peer:
    def load() -> Callable[..., Any]:
        return getattr(import_module(f"fla.ops.{module}.naive"), function)

    return Peer(name=f"fla {name}", op=op, package="fla", load=load, adapt=adapt, longest=longest)


def _mamba(a: Arguments) -> Inputs | None:
    if a["B"].shape[2] != 1 or a.get("D") is None or a.get("cu_seqlens") is not None:
        return None
    return {name: a.get(name) for name in ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")}


def _mambapy() -> Callable[..., Any]:
    from mambapy.pscan import pscan

    def scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus):
        delta = delta if delta_bias is None else delta + delta_bias
        delta = torch.nn.functional.softplus(delta) if delta_softplus else delta
        h = pscan((delta[..., None] * A).exp(), (delta * x)[..., None] * B)
        y = (h @ C[:, :, 0, :, None])[..., 0] + D * x
        return y if z is None else y * torch.nn.functional.silu(z)

    return scan


def _window(a: Arguments) -> Inputs | None:
    fits = a.get("window") is not None and a.get("causal", True) and not a.get("sinks")
    if not fits or a["q"].shape[2] != a["v"].shape[2]:
        return None
    # Heads before time.
    return {n: a[n].transpose(1, 2).contiguous() for n in ("q", "k", "v")} | {"window": a["window"]}


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        t = q.shape[2]
        if t not in masks:
            masks[t] = create_block_mask(
                lambda b, h, i, j: (j <= i) & (i - j < window), None, None, t, t, device=str(q.device)
            )
        return compiled(q, k, v, block_mask=masks[t])

    return attend


PEERS = (
    _fla("chunk", "gated_linear", "simple_gla", "naive_chunk_simple_gla", _scalar_decay),
    _fla("recurrent", "gated_linear", "gla", "naive_recurrent_gla", _channel_decay, STEPWISE_STEPS),
    _fla("chunk", "delta_rule", "delta_rule", "delta_rule_chunkwise", _delta(0)),
    _fla("chunk", "delta_rule", "gated_delta_rule", "naive_chunk_gated_delta_rule", _delta(3)),
    _fla("recurrent", "delta_rule", "kda", "naive_recurrent_kda", _delta(4), STEPWISE_STEPS),
    Peer(name="mambapy", op="selective_scan", package="mambapy", load=_mambapy, adapt=_mamba),
    Peer(name="flex_attention", op="attention", package="torch", load=_flex, adapt=_window),
    _fla("recurrent", "delta_rule", "generalized_delta_rule.dplr", "dplr_recurrence", _rank_one, STEPWISE_STEPS),
)


def served(peer: Peer, arguments: Arguments, length: int) -> bool:
    return (peer.longest is None or length <= peer.longest) and peer.adapt(arguments) is not None


def in_its_own_process(module: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What `python -m module` prints as JSON when it is given `asked` as JSON; or "error" -> why there is nothing."""
    # -P: a folder called `kernels` where the command runs must not be taken for the package of that name.
    command = [sys.executable, "-P", "-m", module, json.dumps(asked | {"threads": torch.get_num_threads()})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def times(peer: Peer, case: str, length: int, *, dtype: str, device: str, repeats: int) -> dict[str, Any]:
    """The peer's times on a case in a process of its own: pass -> milliseconds, and "MB"; or "error" -> why not."""
    asked = {"peer": PEERS.index(peer), "case": case, "length": length, "dtype": dtype, "device": device}
    return in_its_own_process("omnimix.cli.bench_kernels_peers", asked | {"repeats": repeats})


def main(argv: Sequence[str]) -> int:
    """One peer on one case, as `times` asks for it; prints its times as JSON."""
    from .bench_kernels import DTYPES, Stopwatch, passes
    from .check_kernels import cast

    asked = json.loads(argv[0])
    torch.set_num_threads(asked["threads"])
    peer, length = PEERS[asked["peer"]], asked["length"]
    make = next(c.bench for c in get_op(peer.op).cases() if c.name == asked["case"] and c.bench is not None)
    draw = Draw.seeded(length, device=asked["device"], dtype=torch.float32)
    inputs = peer.adapt(cast(make(draw, length), DTYPES[asked["dtype"]]))
    watch = Stopwatch(device=torch.device(asked["device"]), repeats=asked["repeats"])
    function, leaves = peer.load(), _leaves(inputs)
    with torch.no_grad():
        # What compiles at its first call must not have that timed.
        function(**leaves)
    try:
        found = passes(function, leaves, watch)
    except NotImplementedError:
        # flex_attention has no backward pass on CPUs.
        found = passes(function, leaves, watch, backward=False)
    print(json.dumps(found))
    return 0


def _leaves(inputs: Inputs) -> Inputs:
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
