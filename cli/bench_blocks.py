"""Times whole blocks compared with other packages: `omnimix bench blocks`.

Each row is measured in a process of its own: some packages change how others behave once they are imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone
from ..backbones.config import BackboneConfig, Site
from ..backbones.context import Context
from ..backbones.ffn import get_ffn
from ..backbones.layout import Layout
from ..errors import ConfigError, UnknownName
from ..kernels.registry import using
from ..utils.console import say
from ..utils.devices import usable_device, where_on
from ..utils.options import add_device, add_json, add_threads, set_threads, summary
from .bench_kernels import DTYPES, Stopwatch, peak_bytes
from .bench_kernels_peers import in_its_own_process

Call = Callable[[Tensor], Tensor]
# Where they are installed, transformers calls kernels of theirs that need a GPU.
HIDDEN = ("fla", "mamba_ssm", "causal_conv1d")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something that maps (1, t, dim) to the same.

    Args:
        block: the kind of block, by which rows are compared.
        name: as the table shows it.
        dim: channels.
        build: makes it: a module to differentiate, and the call.
        packages: what must be installed.
        backend: of our kernels.
    """

    block: str
    name: str
    dim: int
    build: Callable[[], tuple[nn.Module, Call]]
    packages: tuple[str, ...] = ()
    backend: str = "auto"

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


def _stack(mixer: str) -> tuple[nn.Module, Call]:
    net = Backbone(BackboneConfig(dim=768, depth=2, pattern=[mixer], ffn=None))
    layout = Layout(causal=True)
    return net, lambda x: net(x, layout).y


def _ffn(name: str, **options: Any) -> tuple[nn.Module, Call]:
    entry = get_ffn(name)
    layer = entry.build(512, entry.config(**options), Site())
    context = Context(Layout())
    return layer, lambda x: layer(x, context).y


def _transformers_mamba(use_mambapy: bool) -> tuple[nn.Module, Call]:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(
        vocab_size=8, hidden_size=768, state_size=16, num_hidden_layers=2, use_mambapy=use_mambapy, use_cache=False
    )
    net = MambaModel(config)
    return net, lambda x: net(inputs_embeds=x).last_hidden_state


def _mambapy() -> tuple[nn.Module, Call]:
    from mambapy.mamba import Mamba, MambaConfig

    net = Mamba(MambaConfig(d_model=768, n_layers=2, d_state=16))
    return net, net


def _transformers_mamba2() -> tuple[nn.Module, Call]:
    from transformers import Mamba2Config, Mamba2Model

    config = Mamba2Config(
        vocab_size=8,
        hidden_size=768,
        num_heads=24,
        head_dim=64,
        state_size=128,
        n_groups=1,
        num_hidden_layers=2,
        use_cache=False,
    )
    net = Mamba2Model(config)
    return net, lambda x: net(inputs_embeds=x).last_hidden_state


def _transformers_moe() -> tuple[nn.Module, Call]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    # transformers takes it among the options that it does not declare.
    grouped: dict[str, Any] = {"experts_implementation": "grouped_mm"}
    config = MixtralConfig(
        hidden_size=512, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2, **grouped
    )
    layer = MixtralSparseMoeBlock(config)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02)

    def call(x: Tensor) -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    return layer, call


MAMBA, MAMBA2, MOE = "2 × mamba, 768 wide, state 16", "2 × mamba2, 768 wide, state 128", "8 experts, top 2, 512 × 1024"

SUBJECTS = (
    Subject(block=MAMBA, name="native", dim=768, build=lambda: _stack("mamba"), backend="native"),
    Subject(block=MAMBA, name="chunked", dim=768, build=lambda: _stack("mamba"), backend="chunked"),
    Subject(block=MAMBA, name="mambapy", dim=768, build=_mambapy, packages=("mambapy",)),
    Subject(
        block=MAMBA,
        name="transformers with mambapy",
        dim=768,
        build=lambda: _transformers_mamba(True),
        packages=("transformers", "mambapy"),
    ),
    Subject(
        block=MAMBA,
        name="transformers",
        dim=768,
        build=lambda: _transformers_mamba(False),
        packages=("transformers",),
    ),
    Subject(block=MAMBA2, name="chunked", dim=768, build=lambda: _stack("mamba2"), backend="chunked"),
    Subject(block=MAMBA2, name="transformers", dim=768, build=_transformers_mamba2, packages=("transformers",)),
    Subject(block=MOE, name="omnimix", dim=512, build=lambda: _ffn("moe", experts=8, active=2, ratio=2.0)),
    Subject(block=MOE, name="dense, as many products", dim=512, build=lambda: _ffn("swiglu", ratio=4.0)),
    Subject(block=MOE, name="transformers grouped_mm", dim=512, build=_transformers_moe, packages=("transformers",)),
)


def measure(subject: Subject, length: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of inference and of a training step without the optimizer's part, and the latter's peak MB."""
    torch.manual_seed(0)
    net, call = subject.build()
    net.to(device=device, dtype=dtype)
    watch = Stopwatch(device=device, repeats=repeats)
    x = torch.randn(1, length, subject.dim, device=device).to(dtype)

    def step() -> None:
        net.zero_grad()
        call(x.requires_grad_()).float().square().mean().backward()

    with using(subject.backend):
        net.eval()
        with torch.no_grad():
            forward = watch.milliseconds(lambda: call(x))
        net.train()
        both, peak = watch.milliseconds(step), peak_bytes(step, device)
    return {"forward": forward, "forward+backward": both, "MB": None if peak is None else peak / 1e6}


def bench_blocks(
    *,
    blocks: Sequence[str] | None = None,
    lengths: Sequence[int] = (1024,),
    skip: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row a subject, length and pass; the last subject of a kind that ran is what the others are compared with.

    Args:
        blocks: "mamba", "mamba2", "moe"; all by default.
        lengths: tokens.
        skip: names of subjects to leave out.
        dtype: of weights and tokens.
        device: "cpu", "cuda", ...
        repeats: calls whose median is taken; what takes more than a few seconds is called twice at most.

    Returns:
        The rows, and the subjects that were left out with the reason.

    Raises:
        UnknownName: no such block, subject or dtype.
        ConfigError: a length or number of repeats below 1.
    """
    kinds = {"mamba": MAMBA, "mamba2": MAMBA2, "moe": MOE}
    for name in blocks or ():
        if name not in kinds:
            raise UnknownName("block", name, kinds)
    for name in skip:
        if name not in {s.name for s in SUBJECTS}:
            raise UnknownName("subject", name, {s.name for s in SUBJECTS})
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if min([repeats, *lengths]) < 1:
        raise ConfigError(f"repeats {repeats} and lengths {list(lengths)} must be at least 1")
    wanted = [kinds[name] for name in blocks or kinds]
    chosen = [(i, s, t) for t in lengths for i, s in enumerate(SUBJECTS) if s.block in wanted and s.name not in skip]
    from rich.console import Console
    from rich.progress import track

    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for i, s, t in track(chosen, description="bench", console=Console(stderr=True), transient=True):
        if s.missing:
            left_out[f"{s.name}, {s.block}"] = f"not installed: {', '.join(s.missing)} (pip install 'omnimix[bench]')"
            continue
        asked = {"subject": i, "length": t, "dtype": dtype, "device": device, "repeats": repeats}
        taken = in_its_own_process("omnimix.cli.bench_blocks", asked)
        if "error" in taken:
            left_out[f"{s.name}, {s.block}"] = taken["error"]
        else:
            found[s.block, s.name, t] = taken
    return _rows(found), left_out


def _rows(found: dict[tuple[str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found by block, subject and length, one row a pass."""
    rows = []
    for (block, name, t), taken in found.items():
        peer = [n for b, n, length in found if (b, length) == (block, t)][-1]
        rows += [
            {
                "block": block,
                "with": name,
                "pass": kind,
                "T": t,
                "ms": round(taken[kind], 1),
                "x last": round(found[block, peer, t][kind] / taken[kind], 2),
                "peak MB": round(taken["MB"], 1) if kind != "forward" and taken["MB"] is not None else None,
            }
            for kind in ("forward", "forward+backward")
        ]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """`omnimix bench blocks`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="omnimix bench blocks", description=summary(__doc__))
    parser.add_argument("--blocks", nargs="+", metavar="NAME", help="only these: mamba, mamba2, moe")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024], metavar="T", help="tokens")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="subjects to leave out")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of weights and tokens")
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--repeats", type=int, default=5, help="calls whose median is taken")
    add_json(parser)
    options = parser.parse_args(argv)
    from ..utils.console import emit

    set_threads(options.threads)
    device = usable_device(options.device)
    rows, left_out = bench_blocks(
        blocks=options.blocks,
        lengths=options.lengths,
        skip=options.skip,
        dtype=options.dtype,
        device=options.device,
        repeats=options.repeats,
    )
    where = where_on(device)
    emit(f"blocks in {options.dtype} on {where}", rows, options.json)
    for name, why in left_out.items():
        say(f"left out: {name}: {why}", error=True)
    return 0


def _alone(asked: dict[str, Any]) -> None:
    """One subject, as `bench_blocks` asks for it; prints its times as JSON."""
    torch.set_num_threads(asked["threads"])
    subject = SUBJECTS[asked["subject"]]
    if subject.packages:
        # None in sys.modules makes a package look as if it were not installed.
        sys.modules |= dict.fromkeys(HIDDEN)
    taken = measure(subject, asked["length"], DTYPES[asked["dtype"]], torch.device(asked["device"]), asked["repeats"])
    print(json.dumps(taken))


if __name__ == "__main__":
    _alone(json.loads(sys.argv[1]))
