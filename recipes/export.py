"""`omnimix export`: a trained model in the formats of others, each loaded again and compared."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import LanguageModel
from ..backbones.serialization import to_dict
from ..errors import ConfigError, OmnimixError, UnknownName, UnsupportedCall
from ..interop.importing import wanted
from ..modalities import ImageClassifier, load_model, save_model
from ..modalities.common.weights import CONFIG, WEIGHTS, save_weights
from ..modalities.text.text_generator import TextGenerator
from ..utils.console import emit, say, write_atomically
from ..utils.options import add_json, summary
from ..utils.run_folder import RunFolder
from .predictor import Predictor, load

# The largest difference of an output, relative to the largest output.
BOUND = 1e-4
# Tokens of the input that is compared.
TOKENS = 16


class ExportError(OmnimixError):
    """What was exported computes something else, or cannot be exported in this format."""


class _Logits(nn.Module):
    """A model whose only output is its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.model(inputs)
        return out[0] if isinstance(self.model, LanguageModel) else out


def example(source: Predictor | TextGenerator, batch: int) -> Tensor:
    """An input of the shape that a model is trained for, with values that follow from `batch` alone."""
    generator = torch.Generator().manual_seed(batch)
    if isinstance(source, TextGenerator):
        return torch.randint(source.model.vocab_size, (batch, TOKENS), generator=generator)
    return 0.1 * torch.randn(batch, *source.preprocess.shape, generator=generator)


# Writes a model into a folder; returns the file or folder to name, and what computes logits from inputs with it.
Format = Callable[[Any, Path], tuple[Path, Callable[[Tensor], Tensor]]]


def _safetensors(source: Predictor | TextGenerator, out: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    if isinstance(source, TextGenerator):
        save_model(source.model, out)
        source.tokenizer.save(out)
    else:
        save_model(source.model, out, details={"preprocess": source.preprocess.to_dict()})
    return out, _Logits(load_model(out))


def _program(source: Predictor | TextGenerator) -> torch.export.ExportedProgram:
    """The graph of a model for any batch of at least two."""
    given = example(source, 2)
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},)
    return torch.export.export(_Logits(source.model), (given,), dynamic_shapes=shapes, strict=False)


def _torch_export(source: Predictor | TextGenerator, out: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    file = out / "model.pt2"
    torch.export.save(_program(source), file, extra_files={"details.json": json.dumps(_details(source))})
    return file, torch.export.load(file).module()


def _onnx(source: Predictor | TextGenerator, out: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        wanted(package, "the format 'onnx'", "onnx")
    import onnxruntime

    file, given = out / "model.onnx", example(source, 2)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    made: Any = torch.onnx.export(
        _Logits(source.model),
        (given,),
        dynamo=True,
        verbose=False,
        input_names=["inputs"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
    )
    for name, value in _details(source).items():
        made.model.metadata_props[f"omnimix.{name}"] = json.dumps(value)
    made.save(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return file, lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])


def _timm(source: Predictor | TextGenerator, out: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    if not isinstance(source, Predictor) or not isinstance(source.model, ImageClassifier):
        raise UnsupportedCall("timm has image classifiers, and this is none; choose another --format")
    import timm

    from ..interop import timm as registered  # noqa: F401 - which timm.create_model finds

    config: Any = source.model.config
    prepared: Any = source.preprocess
    pools = {"mean": "avg", "max": "max", "class_token": "token", "none": ""}
    content = {
        "architecture": "omnimix_vig_tiny_patch16_224",
        "num_classes": config.head.classes,
        "global_pool": pools[config.head.pool],
        "model_args": {
            "img_size": list(config.image.size),
            "patch_size": list(config.image.patch),
            "in_chans": config.image.channels,
            "class_token": config.image.class_token,
            "stem": config.image.stem,
            "stem_depth": config.image.stem_depth,
            "global_pool": pools[config.head.pool],
            "backbone": to_dict(config.backbone),
        },
        "pretrained_cfg": {
            "input_size": [config.image.channels, *config.image.size],
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "crop_pct": prepared.crop,
            "interpolation": "bilinear",
            "label_names": list(prepared.classes),
            "num_classes": config.head.classes,
            "first_conv": "tokenizer.proj" + ("" if config.image.stem == "patch" else ".layers.0"),
            "classifier": "head.classifier",
        },
    }
    save_weights(source.model, out / WEIGHTS)
    write_atomically(out / CONFIG, json.dumps(content, indent=1) + "\n")
    return out, timm.create_model(f"local-dir:{out}", pretrained=True).eval()


def _hf(source: Predictor | TextGenerator, out: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    if not isinstance(source, TextGenerator):
        raise UnsupportedCall("transformers takes language models of omnimix, and this is none; choose --format timm")
    wanted("transformers", "the format 'hf'", "hf")
    from ..interop.fast_tokenizer import to_tokenizer
    from ..interop.huggingface import AutoModelForCausalLM, to_pretrained

    to_pretrained(source.model, end=source.tokenizer.end).save_pretrained(out)
    to_tokenizer(source.tokenizer).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    return out, lambda inputs: model(inputs).logits


FORMATS: dict[str, Format] = {
    "safetensors": _safetensors,
    "torch-export": _torch_export,
    "onnx": _onnx,
    "timm": _timm,
    "hf": _hf,
}


def _details(source: Predictor | TextGenerator) -> dict[str, Any]:
    """What whoever uses an exported model needs to know, as plain values."""
    if isinstance(source, TextGenerator):
        return {"vocab_size": source.model.vocab_size}
    values = source.preprocess.to_dict()
    return {"classes": values.pop("classes"), "preprocess": values}


def export(source: str | Path, format: str, out: str | Path | None = None) -> tuple[Path, float]:
    """Write a trained model in a format of others, load it again, and compare.

    Args:
        source: a run by its name under `runs/` or its folder, or a folder of a saved model.
        format: "safetensors" (a folder that `omnimix.load` takes), "torch-export" (`model.pt2`), "onnx" (`model.onnx`,
            for batches of any size), "timm" (a folder for `timm.create_model("local-dir:DIR", pretrained=True)`), or
            "hf" (a folder for `AutoModelForCausalLM`).
        out: the folder to write into; by default `export/FORMAT` in the run's.

    Returns:
        What was written, and the largest difference of its logits, relative to the largest logit.

    Raises:
        UnknownName: no such format.
        ConfigError: `out` exists and is not empty.
        MissingPackage, UnsupportedCall: the format needs a package, or does not exist for such a model.
        ExportError: the model cannot be exported so, or what was written computes something else; nothing is left.
    """
    if format not in FORMATS:
        raise UnknownName("format", format, FORMATS)
    model = load(source)
    folder = Path(out) if out is not None else _folder_of(source) / "export" / format
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out is {str(folder)!r}, which is not empty; name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as unfinished:
        # Whatever ends this, half an export must not stand in the way of the next one.
        unfinished.callback(shutil.rmtree, folder, ignore_errors=True)
        made, difference = _written(model, format, folder)
        unfinished.pop_all()
    return made, difference


def _written(model: Predictor | TextGenerator, format: str, folder: Path) -> tuple[Path, float]:
    try:
        with torch.inference_mode(False), torch.no_grad():
            made, again = FORMATS[format](model, folder)
            difference = max(_difference(model, again, batch) for batch in (2, 3))
    except OmnimixError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, torch.onnx.errors.OnnxExporterError) as error:
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"the model cannot be written as {format!r}: {said}; choose another --format") from error
    if not difference <= BOUND:
        raise ExportError(
            f"what was written as {format!r} differs from the model by {difference:.1e}, relative to the largest "
            f"logit; at most {BOUND:.0e} is allowed"
        )
    return made, difference


def _folder_of(source: str | Path) -> Path:
    return Path(source) if (Path(source) / WEIGHTS).is_file() else RunFolder.finished(str(source)).path


def _difference(source: Predictor | TextGenerator, again: Callable[[Tensor], Tensor], batch: int) -> float:
    inputs = example(source, batch)
    wanted, found = _Logits(source.model)(inputs), again(inputs)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def main(argv: list[str]) -> int:
    """`omnimix export`."""
    parser = argparse.ArgumentParser(prog="omnimix export", description=summary(__doc__).partition(": ")[2])
    parser.add_argument("run", help="folder of the run, or its name under runs/")
    parser.add_argument("--format", default="onnx", help=f"one of {', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("--out", help="folder to write into; default: export/FORMAT in the run's folder")
    add_json(parser)
    options = parser.parse_args(argv)
    made, difference = export(options.run, options.format, options.out)
    emit("exported", [{"file": str(made), "format": options.format, "largest difference": difference}], options.json)
    if options.json != "-":
        say(f"loaded again and compared: equal to {BOUND:.0e} of the largest logit")
    return 0
