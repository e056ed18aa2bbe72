"""Deliberate mistakes in mixers, each a changed line, and the law that must catch it."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from types import FunctionType

import pytest

MIXERS = "omnimix.backbones.mixers"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One mistake.

    Args:
        mixer: whose laws must fail.
        name: what is wrong.
        where: the method, "module:Class.method", module below `omnimix.backbones.mixers`.
        old, new: the text in it, and what it becomes, at every occurrence.
        law: the number of the law that catches it.
    """

    mixer: str
    name: str
    where: str
    old: str
    new: str
    law: int = 12

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the mutated method into its class, as long as `monkeypatch` lasts."""
        module_name, _, path = self.where.partition(":")
        module = importlib.import_module(f"{MIXERS}.{module_name}")
        owner, _, method = path.partition(".")
        cls = getattr(module, owner)
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(vars(cls)[method])))
        assert self.old in source, f"{self.where} holds no {self.old!r} any more; update the mutation {self.name!r}"
        mutated = source.replace(self.old, self.new)
        # A function around it holds the class, which `super()` without arguments looks for.
        text = f"def around(__class__):\n{textwrap.indent(mutated, '    ')}\n    return {method}\n"
        names: dict[str, FunctionType] = {}
        exec(compile(text, f"<{self.name}>", "exec", dont_inherit=True), vars(module), names)
        monkeypatch.setattr(cls, method, names["around"](cls))


def _of(mixer: str, *rows: tuple) -> list[Mutation]:
    """Rows of (where, name, old, new) and, where it is not 12, the law."""
    return [
        Mutation(mixer=mixer, where=where, name=name, old=old, new=new, law=law[0] if law else 12)
        for where, name, old, new, *law in rows
    ]


_CARRIED = 'None if state is None else state["memory"]'
_CONV = 'None if state is None else state["conv"]'
_BORDERS = "cu_seqlens=context.layout.cu_seqlens"

GLA = _of(
    "gla",
    ("gla:_Direction.forward", "decay after the write", "k.unflatten", "(k * decay.exp()).unflatten"),
    ("gla:_Direction.forward", "q and k swapped", "x, q, k, v = streams", "x, k, q, v = streams"),
    ("gla:_Direction.forward", "sigmoid for its logarithm", "= log_sigmoid(", "= -torch.sigmoid("),
    ("gla:_Direction.forward", "gate temperature dropped", " / self.temperature", ""),
    ("gla:_Direction.forward", "default scale replaced", _BORDERS, _BORDERS + ", scale=1.0"),
    ("gla:_Direction.forward", "state not carried", _CARRIED, "None", 2),
    ("gla:_Direction.forward", "cu_seqlens ignored", _BORDERS, "cu_seqlens=None", 3),
    (
        "gla:_Direction.forward",
        "decay in bfloat16",
        " / self.temperature",
        " / self.temperature\n    decay = decay.to(x.dtype)",
        7,
    ),
    (
        "gla:_Direction.forward",
        "decay rounded and widened",
        "decay.unflatten",
        "decay.to(x.dtype).to(decay.dtype).unflatten",
        7,
    ),
    ("gla:GLA.finish", "gate before norm", "(mixed, kept)", "(mixed * kept * kept.sigmoid())"),
    ("gla:GLA.finish", "gate dropped", "(mixed, kept)", "(mixed)"),
    ("gla:GLA.__init__", "norm over all channels", "groups=heads", "groups=1"),
    (
        "gla:GLA.finish",
        "norm over the wrong axis",
        "(mixed, kept)",
        "(mixed.unflatten(-1, (2, -1)).mT.flatten(-2), kept)",
    ),
    ("gla:GLA.__init__", "crash after layer 0", "self.state_shape =", "assert not site.layer\n    self.state_shape ="),
)
RETENTION = _of(
    "retention",
    ("retention:_Direction.__init__", "slopes off by one", "(-5 - h)", "(-4 - h)"),
    (
        "retention:Retention.__init__",
        "another layer's base",
        "config.rope_base)",
        "config.rope_base * (1 + site.layer))",
    ),
    (
        "retention:Retention.__init__",
        "another layer's slopes",
        "self.state_shape =",
        "self.branches[0].decay = [g / (1 + site.layer) for g in self.branches[0].decay]\n    self.state_shape =",
    ),
    ("retention:_Direction.forward", "neighbours rotated", "self.rope_base)", "self.rope_base, interleaved=True)"),
    ("retention:_Direction.forward", "positions off by one", "rotary(q, positions,", "rotary(q, positions + 1,"),
    ("retention:_Direction.forward", "decay in bfloat16", "dtype=wide", "dtype=q.dtype", 7),
    ("retention:_Direction.forward", "state not carried", _CARRIED, "None", 2),
    ("retention:Retention.__init__", "norm over all channels", "groups=heads", "groups=1"),
)
MAMBA = _of(
    "mamba",
    ("mamba:_Direction.forward", "A without exp", "-self.A_log.to(wide).exp()", "-self.A_log.to(wide).abs()"),
    ("mamba:_Direction.forward", "Δ without softplus", "delta_softplus=True", "delta_softplus=False"),
    ("mamba:_Direction.forward", "Δ without bias", "delta_bias=bias", "delta_bias=None"),
    ("mamba:_Direction.forward", "D dropped", "D=self.D", "D=None"),
    ("mamba:_Direction.forward", "B and C swapped", "dt, b, c =", "dt, c, b ="),
    ("mamba:_Direction.forward", "no activation after the convolution", 'activation="silu"', "activation=None"),
    ("mamba:_Direction.forward", "gate dropped", "z=z", "z=None"),
    ("mamba:_Direction.forward", "convolution's state not carried", _CONV, "None", 2),
    ("mamba:_Direction.forward", "A in bfloat16", ".to(wide).exp()", ".exp().to(wide)", 7),
    ("mamba:Mamba.project", "x and z swapped", "chunk(2, dim=-1)", "chunk(2, dim=-1)[::-1]"),
)
MAMBA2 = _of(
    "mamba2",
    ("mamba2:_Direction.forward", "a default scale", "scale=1.0", "scale=None"),
    ("mamba2:Mamba2.__init__", "norm before gate", "norm_before_gate=False", "norm_before_gate=True"),
    ("mamba2:Mamba2.__init__", "norm over all groups", "groups=config.groups, norm", "groups=1, norm"),
    ("mamba2:_Direction.forward", "input without Δ", "x * dt[..., None].to(x.dtype)", "x"),
    (
        "mamba2:_Direction.forward",
        "Δ without softplus",
        "F.softplus(dt.to(wide) + self.dt_bias)",
        "(dt.to(wide) + self.dt_bias)",
    ),
    ("mamba2:_Direction.forward", "D dropped", "self.D[:, None]", "(0 * self.D[:, None])"),
    (
        "mamba2:_Direction.forward",
        "decay in bfloat16",
        "-dt * self.A_log.to(wide).exp()",
        "(-dt * self.A_log.exp()).to(x.dtype)",
        7,
    ),
    ("mamba2:_Direction._step", "another step for one token", "dt[:, 0]", "2 * dt[:, 0]"),
    ("mamba2:_Direction.forward", "cu_seqlens ignored in the convolution", _BORDERS, "cu_seqlens=None", 3),
)
DELTA = [
    *_of(
        "deltanet",
        ("parts.delta:DeltaDirection.forward", "β without sigmoid", ".sigmoid() * self.most", " * self.most"),
        ("parts.delta:DeltaDirection.forward", "β never above 1", ".sigmoid() * self.most", ".sigmoid()"),
        (
            "parts.delta:DeltaDirection.forward",
            "key not normalised",
            "unit(k, self.heads)",
            "k.unflatten(-1, (self.heads, -1))",
        ),
        (
            "parts.delta:DeltaDirection.forward",
            "key normalised over all heads",
            "unit(k, self.heads)",
            "unit(k, 1).unflatten(-1, (self.heads, -1)).squeeze(2)",
        ),
        (
            "parts.delta:DeltaDirection.forward",
            "no activation after the convolution",
            'activation="silu"',
            "activation=None",
        ),
        ("parts.delta:DeltaDirection.forward", "cu_seqlens ignored", _BORDERS, "cu_seqlens=None", 3),
        ("deltanet:DeltaNet.finish", "norm dropped", "self.norm(mixed)", "mixed"),
    ),
    *_of(
        "gated_deltanet",
        ("parts.step_decay:StepDecay.forward", "rate without exp", ".to(wide).exp()", ".to(wide).abs()"),
        ("parts.step_decay:StepDecay.forward", "step without bias", " + self.bias", ""),
        ("parts.step_decay:StepDecay.forward", "step without softplus", "F.softplus(", "F.relu("),
        ("gated_deltanet:GatedDeltaNet.finish", "gate dropped", "(mixed, kept)", "(mixed)"),
    ),
    *_of(
        "kda",
        ("kda:KDA.__init__", "another gate", 'gate="sigmoid"', 'gate="silu"'),
        (
            "parts.step_decay:StepDecay.forward",
            "decay in bfloat16",
            "return steps * -self.log_rate.to(wide).exp()[:, None]",
            "return (steps * -self.log_rate.exp()[:, None]).to(x.dtype)",
            7,
        ),
    ),
]
RWKV7 = _of(
    "rwkv7",
    (
        "rwkv7:_Direction.forward",
        "token shift off by one",
        "change = before - x",
        "before = before.roll(1, 1)\n    change = before - x",
    ),
    ("rwkv7:_Direction.forward", "shift of the wrong sign", "change = before - x", "change = x - before"),
    ("rwkv7:_Direction.forward", "shift not carried", 'None if state is None else state["last"]', "None", 2),
    ("rwkv7:_Direction.forward", "r and k swapped", "r, k, v, rate = (s", "k, r, v, rate = (s"),
    ("rwkv7:_Direction.forward", "exp for sigmoid", "self.decay(xw).sigmoid()", "self.decay(xw).exp()"),
    ("rwkv7:_Direction.forward", "bonus missing", "(r * k * self.bonus)", "(0 * r * k * self.bonus)"),
    ("rwkv7:_Direction.forward", "a default scale", "scale=1.0", "scale=None"),
    ("rwkv7:_Direction.forward", "removal without its rate", "(-rate * removal)", "(-removal)"),
    (
        "rwkv7:_Direction.forward",
        "key not normalised",
        "unit(k * self.removal, self.heads, LENGTH_EPS)",
        "(k * self.removal).unflatten(-1, (self.heads, -1))",
    ),
    ("rwkv7:_Direction.forward", "short keys shortened", "self.heads, LENGTH_EPS)", "self.heads)"),
    ("rwkv7:_Direction.__init__", "group norm over all channels", "nn.GroupNorm(heads,", "nn.GroupNorm(1,"),
    ("rwkv7:_Direction.forward", "gate dropped", "o * self.gate(xg)", "o + 0 * self.gate(xg)"),
)
ATTENTION = [
    *_of(
        "attention",
        ("attention:Attention.__init__", "wrong rotary base", "config.rope_base if", "2 * config.rope_base if"),
        ("attention:Attention.mix", "neighbours rotated", "self.rope_base)", "self.rope_base, interleaved=True)"),
        (
            "attention:Attention.mix",
            "keys not rotated",
            "qk = rotary(qk, context.positions_of(x), self.rope_base)",
            "qk = torch.cat([rotary(qk[:, :, :heads], context.positions_of(x), self.rope_base), qk[:, :, heads:]], 2)",
        ),
        ("attention:Attention.mix", "gate without sigmoid", "gate.sigmoid()", "gate"),
        ("attention:Attention.mix", "keys not normalised", "self.k_norm(qk[:, :, heads:])", "qk[:, :, heads:]"),
        ("attention:Attention.attend", "causal mask dropped", "causal=layout.causal is True", "causal=False"),
    ),
    *_of(
        "window",
        (
            "window:Window.__init__",
            "window off by one",
            "config.window, config.sinks",
            "config.window + 1, config.sinks",
        ),
        (
            "window:Window.__init__",
            "sinks off by one",
            "config.window, config.sinks",
            "config.window, config.sinks + 1",
        ),
    ),
    *_of(
        "moba",
        (
            "moba:MoBA.__init__",
            "top_k off by one",
            "config.block_size, config.top_k",
            "config.block_size, config.top_k + 1",
        ),
        ("moba:MoBA.__init__", "blocks off by one", "config.block_size, config", "config.block_size + 1, config"),
        ("moba:MoBA._means", "mean of the last block over empty slots", " / filled", " / self.block_size"),
    ),
    *_of(
        "nsa",
        ("nsa:NSA._coarse", "blocks off by one", '"number": config.blocks', '"number": config.blocks + 1'),
        ("nsa:NSA._coarse", "local blocks off by one", '"local": config.local', '"local": config.local + 1'),
        ("nsa:NSA._coarse", "compressed keys seen too early", "- config.size + 1", "- config.size + 2"),
        ("nsa:NSA.mix", "window off by one", "window=config.reach", "window=config.reach + 1"),
        ("nsa:NSA.mix", "gates without sigmoid", ".sigmoid()", ""),
        (
            "nsa:NSA.mix",
            "branches swapped",
            "* o_coarse + gates[:, :, :, 1] * o_chosen",
            "* o_chosen + gates[:, :, :, 1] * o_coarse",
        ),
    ),
    *_of(
        "linear",
        ("linear:Linear.mix", "normaliser dropped", "(o[..., :-1] / (o[..., -1:] + self.eps))", "o[..., :-1]"),
        ("linear:Linear.mix", "normaliser without eps", " + self.eps", ""),
        ("linear:Linear.mix", "a default scale", "scale=1.0", "scale=None"),
        ("linear:Linear._features", "elu without one", "F.elu(x) + 1", "F.elu(x) + 2"),
    ),
]
LONG = [
    *_of(
        "rglru",
        (
            "rglru:_Direction.forward",
            "input scaled by 1 − a",
            "torch.sqrt(TINY - torch.expm1(2 * log_a))",
            "-torch.expm1(log_a)",
        ),
        ("rglru:_Direction.forward", "gates swapped", "r, i = ", "i, r = "),
        ("rglru:_Direction.forward", "exponent dropped", "-self.exponent * ", "-"),
        ("rglru:_Direction.forward", "decay rounded to bfloat16", "log_a.exp()", "log_a.exp().to(x.dtype).to(wide)", 7),
        ("rglru:RGLRU.finish", "another GELU", 'approximate="tanh"', 'approximate="none"'),
    ),
    *_of(
        "s4d",
        ("s4d:_Direction.discretised", "conjugates dropped", "(2 * self.C.to(wide))", "self.C.to(wide)"),
        ("s4d:_Direction.discretised", "A without exp", "-self.A_log.to(wide).exp()", "-self.A_log.to(wide).abs()"),
        ("s4d:_Direction.forward", "D dropped", "skip=self.D", "skip=None"),
        ("s4d:S4D.finish", "activation dropped", "F.gelu(mixed)", "mixed"),
        ("s4d:_Direction.forward", "state off by one step", "lengths.new_ones(1)", "lengths.new_zeros(1)", 2),
    ),
    *_of(
        "hyena",
        ("hyena:_Direction.forward", "skip dropped", "skip=skip", "skip=None"),
        ("hyena:_Direction.forward", "gates in another order", "out_gate, *gates, z =", "*gates, out_gate, z ="),
        ("parts.implicit_filters:ImplicitFilters.forward", "another window", "math.log(0.01)", "math.log(0.1)"),
        ("parts.implicit_filters:ImplicitFilters.forward", "sines of the wrong sign", "-angle.sin()", "angle.sin()"),
        (
            "hyena:_Direction.forward",
            "past inputs not carried",
            "None] * convolutions if state is None",
            "None] * convolutions if True",
            2,
        ),
    ),
    *_of(
        "ttt",
        ("ttt:_Direction.forward", "mini-batch off by one", "chunk=self.config.chunk", "chunk=self.config.chunk + 1"),
        ("ttt:_Direction.forward", "learning rate without its base", "self.base_lr * ", ""),
        (
            "ttt:_Direction.forward",
            "learning rate without sigmoid",
            "self.base_lr * gates.pop(0).sigmoid()",
            "self.base_lr * gates.pop(0).exp()",
        ),
        ("ttt:_Direction.forward", "forgets too fast", " / 16", ""),
        ("ttt:_Direction.forward", "places in the sequence", " % self.config.chunk", ""),
        ("ttt:_Direction.forward", "keys not normalised", "F.normalize(k, dim=-1)", "k"),
    ),
]

DIRECTIONS = _of(
    "gla",
    ("base:ScanMixer.mix", "directions summed", "total / len(found)", "total"),
    ("base:ScanMixer.mix", "order not restored", "restore(part, order, layout)", "part"),
    ("base:ScanMixer.mix", "one branch for all directions", "branch(tuple(", "self.branches[0](tuple("),
)

MUTATIONS = [*DIRECTIONS, *GLA, *RETENTION, *MAMBA, *MAMBA2, *DELTA, *RWKV7, *ATTENTION, *LONG]
