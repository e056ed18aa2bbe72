"""The commands that inform: `omnimix list`, `omnimix env` and `omnimix kernels explain`."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

from ..errors import ConfigError
from ..utils.console import emit
from ..utils.devices import devices, native_bf16, usable_device
from ..utils.options import add_device, add_json

PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "triton", "lightning", "transformers")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"omnimix {command}", description=description)
    add_json(parser)
    return parser


def list_mixers(argv: list[str]) -> None:
    parser = _parser("list mixers", "The sequence mixers, and what each declares to serve.")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table as Markdown, as it stands in the documentation"
    )
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown(mixer_rows()), end="")
    else:
        emit("mixers", mixer_rows(), options.json)


def mixer_rows() -> list[dict[str, Any]]:
    """One row a mixer: what it is and, as it declares, how it serves each modality."""
    from ..backbones.config import Site
    from ..backbones.mixers import get_mixer
    from ..backbones.mixers import list_mixers as names
    from ..backbones.scan import scan_orders

    rows = []
    for name in names():
        entry = get_mixer(name)
        forward, both = (
            entry.build(48, entry.examples[0], Site(scan=scan_orders(s))).capabilities
            for s in ("forward", "bidirectional")
        )
        streams = f"streams, {'constant state' if forward.constant_state else 'growing cache'}"
        diffusion = {"masked": both.bidirectional, "block": both.blockwise and both.streaming}
        whole = "bidirectional" if forward.bidirectional else "scans" if both.bidirectional else "no"
        live = "streams" if forward.causal and forward.streaming else "no streaming"
        lengths = "packed" if both.packed else "one length per batch"
        rows.append(
            {
                "mixer": name,
                "what it is": entry.summary,
                "causal sequences": "no" if not forward.causal else streams if forward.streaming else "yes",
                "text by diffusion": ", ".join(name for name, served in diffusion.items() if served) or "no",
                "packed": "yes" if forward.packed else "no",
                "images": whole,
                "video": f"{whole}, {live}",
                "audio": f"{whole}, {lengths}",
                "source": entry.source,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def list_objectives(argv: list[str]) -> None:
    options = _parser("list objectives", "What language models are trained for.").parse_args(argv)
    emit("objectives", objective_rows(), options.json)


def objective_rows() -> list[dict[str, Any]]:
    """One row an objective of language models: what it is and how such models write."""
    from ..backbones.heads import get_objective
    from ..backbones.heads import list_objectives as names

    return [
        {
            "objective": name,
            "what it is": get_objective(name).summary,
            "writes": "token by token" if get_objective(name).build.decoder == "autoregressive" else "by diffusion",
            "source": get_objective(name).source,
        }
        for name in names()
    ]


def list_models(argv: list[str]) -> None:
    parser = _parser("list models", "The models that omnimix.create_model builds by name.")
    parser.add_argument("--filter", default="*", metavar="PATTERN", help="only those that match, such as 'vi*'")
    options = parser.parse_args(argv)
    emit("models", model_rows(options.filter), options.json)


def model_rows(pattern: str = "*") -> list[dict[str, Any]]:
    """One row a named model: how many parameters it has, and where its mixers come from.

    Raises:
        ConfigError: no name matches the pattern.
    """
    import torch

    from ..backbones.registry import entry_of
    from ..modalities import create_model
    from ..modalities import list_models as names

    if not (found := names(pattern)):
        raise ConfigError(f"--filter is {pattern!r}, which no model's name matches; omnimix list models shows them all")
    rows = []
    for name in found:
        # Nothing is allocated or drawn there.
        with torch.device("meta"):
            model: Any = create_model(name)
        mixers = (layer.mixer for layer in model.config.backbone.layers if layer.mixer is not None)
        rows.append(
            {
                "model": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "source": "; ".join(dict.fromkeys(entry_of(mixer).source for mixer in mixers)),
            }
        )
    return rows


def list_recipes(argv: list[str]) -> None:
    options = _parser("list recipes", "The recipes and the configurations that come with them.").parse_args(argv)
    from ..recipes import recipe_rows

    emit("recipes", recipe_rows(), options.json)


def env(argv: list[str]) -> None:
    options = _parser(
        "env", "Versions, devices, number formats, and for every kernel the backend that `auto` takes with the reason."
    ).parse_args(argv)
    emit("environment", [*version_rows(), *device_rows(), *kernel_rows()], options.json)


def version_rows() -> list[dict[str, str]]:
    from ..utils.version import __version__

    rows = [
        {"item": "omnimix", "value": __version__, "note": ""},
        {"item": "python", "value": platform.python_version(), "note": f"{platform.system()} {platform.machine()}"},
    ]
    for package in PACKAGES:
        try:
            rows.append({"item": package, "value": metadata.version(package), "note": ""})
        except metadata.PackageNotFoundError:
            rows.append({"item": package, "value": "not installed", "note": ""})
    return rows


def device_rows() -> list[dict[str, str]]:
    import torch

    rows = []
    for device in devices():
        if device == "cpu":
            native = native_bf16()
            rows += [
                {"item": "cpu", "value": torch.backends.cpu.get_cpu_capability(), "note": platform.processor()},
                {"item": "threads", "value": str(torch.get_num_threads()), "note": "torch.set_num_threads"},
                {
                    "item": "bf16 on cpu",
                    "value": "native" if native else "emulated",
                    "note": "autocast works with both",
                },
            ]
        elif device == "cuda":
            for index in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(index)
                note = f"{found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
                rows.append({"item": f"cuda:{index}", "value": found.name, "note": note})
            rows.append({"item": "bf16 on cuda", "value": str(torch.cuda.is_bf16_supported()), "note": ""})
        else:
            rows.append({"item": device, "value": "available", "note": ""})
    return rows


def kernel_rows() -> list[dict[str, str]]:
    """For every op and device: the backend that `auto` takes for a small float32 call, and why it and no other.

    Where a decoding step (one token, no gradients) takes another one, that has a row of its own.
    """
    rows: dict[str, dict[str, str]] = {}
    for device in devices():
        calls = {"": explanations(device, grad=True), ", one token": explanations(device, tokens=1)}
        for name, backends in calls.items():
            for chosen in (row for row in backends if row["auto"] == "chosen"):
                refused = [r for r in backends if r["op"] == chosen["op"] and r["auto"] == "no"]
                why = "; ".join([chosen["why"], *(f"{r['backend']}: {r['why']}" for r in refused)])
                item = f"{chosen['op']} on {device}"
                if item not in rows or chosen["backend"] != rows[item]["value"]:
                    rows[item + name] = {"item": item + name, "value": chosen["backend"], "note": why}
    return list(rows.values())


def explanations(
    device: str, op: str | None = None, *, tokens: int = 16, batch: int = 1, grad: bool = False
) -> list[dict[str, str]]:
    """One row a backend of one op or of all, for the op's first case on `device`.

    Args:
        device: "cpu", "cuda", ...
        op: its name; None for all ops.
        tokens: length of the sequences.
        batch: their number.
        grad: whether gradients are asked for, as in training.

    Raises:
        UnknownName: no such op.
    """
    import torch

    from ..kernels import Draw, get_op, ops
    from .check_kernels import differentiable

    rows = []
    for entry in ops() if op is None else [get_op(op)]:
        arguments = entry.cases()[0].make(Draw.seeded(device=device, dtype=torch.float32), batch, tokens)
        for name in differentiable(arguments):
            arguments[name].requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            rows += entry.explain(arguments)
    return rows


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def explain(argv: list[str]) -> None:
    parser = _parser("kernels explain", "Which backend serves an op on a device, and why (not) each other one.")
    parser.add_argument("op", nargs="?", help="the op; all of them where it is left out")
    add_device(parser, default=devices()[0])
    parser.add_argument("--tokens", type=_count, default=16, help="length of the sequences (1: a decoding step)")
    parser.add_argument("--batch", type=_count, default=1, help="number of sequences")
    parser.add_argument("--grad", action="store_true", help="with gradients, as in training")
    options = parser.parse_args(argv)
    usable_device(options.device)
    rows = explanations(options.device, options.op, tokens=options.tokens, batch=options.batch, grad=options.grad)
    call = f"batch {options.batch}, length {options.tokens}, {'with' if options.grad else 'without'} gradients"
    emit(f"backends on {options.device}: {call}", rows, options.json)
