"""`omnimix export`: each format is loaded again and computes the same."""

import json
from pathlib import Path

import pytest
import torch

import omnimix as om
from omnimix.__main__ import main
from omnimix.errors import CheckpointError, ConfigError, UnknownName, UnsupportedCall
from omnimix.modalities import ByteTokenizer
from omnimix.modalities.models import save_model
from omnimix.recipes import export as exports
from omnimix.recipes.export import BOUND, FORMATS, ExportError, export

CLASSES = ["cat", "dog", "owl"]
SQUARE = {"classes": CLASSES, "size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "crop": 0.8}
CLIP = SQUARE | {"frames": 4, "sampling": "uniform", "rate": 8.0, "seconds": 1.0}
pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a saved model of each kind."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    small = {"classes": 3, "dim": 16, "depth": 1}
    image = om.create_model(
        "vit_tiny_gla_patch16_224", **small, size=16, patch=4, class_token="first", pool="class_token"
    )
    video = om.create_model("vivit_tiny_gla_patch16_224", **small, size=(4, 16, 16))
    audio = om.create_model("ast_tiny_attention", **small)
    stem = om.create_model("vit_tiny_gla_patch16_224", **small, size=16, patch=4, stem="conv", stem_depth=2)
    heard = {"classes": CLASSES, "rate": audio.tokenizer.config.rate, "seconds": 0.5}
    kinds = (("image", image, SQUARE), ("stem", stem, SQUARE))
    for name, model, details in (*kinds, ("video", video, CLIP), ("audio", audio, heard)):
        save_model(model, folder / name, details={"preprocess": details})
    backbone = om.BackboneConfig(dim=16, depth=2, pattern=["gla", "attention"])
    save_model(om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=257)), folder / "text")
    ByteTokenizer().save(folder / "text")
    return folder


@pytest.mark.parametrize("kind", ["image", "stem", "video", "audio", "text"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format_computes_the_same_or_says_why_not(kind: str, format: str, saved: Path, tmp_path: Path):
    if format == "hf":
        pytest.importorskip("transformers")
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    if (format == "timm" and kind not in ("image", "stem")) or (format == "hf" and kind != "text"):
        with pytest.raises(UnsupportedCall, match="choose (another )?--format"):
            export(saved / kind, format, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    made, difference = export(saved / kind, format, tmp_path / "out")
    assert made.exists() and difference <= BOUND
    if (format, kind) == ("onnx", "image"):
        _check_onnx(made)


def _check_onnx(file: Path) -> None:
    """The file names its inputs and outputs, and tells how inputs are prepared."""
    import onnx

    model = onnx.load(file)
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert told["omnimix.classes"] == CLASSES and told["omnimix.preprocess"]["crop"] == 0.8
    assert [entry.name for entry in model.graph.input] == ["inputs"]
    assert [entry.name for entry in model.graph.output] == ["logits"]


def test_what_is_written_is_what_others_read(saved: Path, tmp_path: Path):
    import timm
    from safetensors.torch import load_file

    export(saved / "image", "timm", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == CLASSES and model.num_classes == 3
    export(saved / "image", "safetensors", tmp_path / "ours")
    assert om.load(tmp_path / "ours").classes == tuple(CLASSES)
    assert (
        load_file(tmp_path / "ours" / "model.safetensors").keys() == load_file(saved / "image/model.safetensors").keys()
    )


def test_a_different_result_is_an_error_and_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch):
    written = exports._safetensors

    def wrong(source, out):
        made, again = written(source, out)
        return made, lambda inputs: again(inputs) * 1.001

    monkeypatch.setitem(FORMATS, "safetensors", wrong)
    with pytest.raises(ExportError, match="differs from the model by 1.0e-03"):
        export(saved / "image", "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch):
    def interrupted(source, out):
        (out / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(saved / "image", "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(saved: Path, tmp_path: Path, capsys):
    file = tmp_path / "rows.json"
    words = ["export", str(saved / "image"), "--format", "torch-export"]
    assert main([*words, "--json", str(file)]) == 0
    [row] = json.loads(file.read_text())
    assert Path(row["file"]) == saved / "image" / "export" / "torch-export" / "model.pt2"
    assert "loaded again and compared" in capsys.readouterr().out
    assert main(words) == 2 and "is not empty" in capsys.readouterr().err


def test_errors(saved: Path, tmp_path: Path):
    with pytest.raises(UnknownName, match="did you mean 'onnx'"):
        export(saved / "image", "onx", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a run directory"):
        export(tmp_path / "nothing", "onnx")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        export(saved / "image", "onnx", tmp_path / "file")
