"""A saved model may be a stranger's: whatever config.json and the weights hold, the answer is a model or our error."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimix.errors import CheckpointError
from omnimix.modalities import load_model, save_model
from omnimix.recipes.audio.predict import Predictor as AudioPredictor
from omnimix.recipes.video.predict import Predictor as VideoPredictor
from omnimix.recipes.vision.predict import predict_files

V01 = Path(__file__).parents[1] / "data" / "v01" / "models"
VALUES = (None, -1, 4.5, 10**7, math.nan, "a", [None])
DETAILS = {
    "image_gla_attention": {"size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 0.9},
    "video": {
        "size": 16,
        "channels": 3,
        "frames": 4,
        "sampling": "uniform",
        "rate": 8.0,
        "crop": 0.9,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "seconds": 1.0,
    },
    "audio_patches": {"rate": 16000, "seconds": 1.0},
}
PREDICTORS = {
    "image_gla_attention": lambda folder: predict_files(folder, []),
    "video": VideoPredictor,
    "audio_patches": AudioPredictor,
}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a model of today, with what its input was prepared by."""

    def make(name: str) -> Path:
        model = load_model(V01 / name)
        details = dict(DETAILS.get(name, {}))
        if details:
            details["classes"] = [f"class {i}" for i in range(model.head.config.classes)]
            if name.startswith("audio"):
                details["rate"] = model.tokenizer.config.rate
            config = getattr(model.config, "image", None) or getattr(model.config, "video", None)
            if config is not None:
                details |= {"size": config.size[-1], "channels": config.channels}
                details |= {"mean": [0.5] * config.channels, "std": [0.5] * config.channels}
                details |= {"frames": config.size[0]} if len(config.size) == 3 else {}
        save_model(model, tmp_path / name, details={"preprocess": details})
        return tmp_path / name

    return make


def places(value, path=()):
    """The ways to all values inside plain ones."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def put(folder: Path, path: tuple, value) -> None:
    content = json.loads((folder / "config.json").read_text())
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["image_gla_attention", "video", "audio_patches", "text_channel_moe"])
def test_any_value_anywhere_is_a_model_or_our_error(name, folder):
    model = folder(name)
    whole = (model / "config.json").read_text()
    open_it = PREDICTORS.get(name, load_model)
    open_it(model)
    refused = 0
    ways = [path for path in places(json.loads(whole)) if path and path[0] != "omnimix"]
    for path in ways:
        for value in VALUES:
            put(model, path, copy.deepcopy(value))
            try:
                open_it(model)
            except CheckpointError as error:
                refused += 1
                assert "config.json" in str(error) or "model.safetensors" in str(error) or str(model) in str(error)
            (model / "config.json").write_text(whole)
    assert refused > 0.7 * len(ways) * len(VALUES)


PREPROCESS = [
    ("crop", 0, "crop is 0.0"),
    ("crop", math.nan, "crop is nan"),
    ("crop", 1e-300, "crop is 1e-300"),
    ("size", -4, "size is -4"),
    ("size", 10**7, "size is 10000000"),
    ("size", 17, "size is (17, 17), and the model has"),
    ("mean", ["a"], "mean"),
    ("mean", [0.5], "mean"),
    ("std", [0, 0, 0], "std"),
    ("std", [math.nan] * 3, "std"),
    ("classes", ["one"], "number of classes is 1"),
    ("classes", [1, 2], "classes"),
    ("channels", 2, "channels is 2"),
]


@pytest.mark.parametrize(("field", "value", "said"), PREPROCESS)
def test_how_input_was_prepared_is_checked(field, value, said, folder):
    model = folder("image_gla_attention")
    put(model, ("details", "preprocess", field), value)
    with pytest.raises(CheckpointError) as error:
        predict_files(model, [])
    assert said in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "x" * (17 << 20), "", "\x00", "[]", "null"])
def test_what_is_no_configuration_is_named(text, folder):
    model = folder("text_gla")
    (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(model)


def rewritten(folder: Path, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


WEIGHTS = {
    "integers": (lambda name, tensor: tensor.to(torch.int32), "is torch.int32, and in the model torch.float32"),
    "nan": (lambda name, tensor: tensor.mul(math.nan), "holds NaN or infinity"),
    "infinity": (lambda name, tensor: tensor.add(math.inf), "holds NaN or infinity"),
    "shapes": (lambda name, tensor: tensor[None].contiguous(), "does not fit the model"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_finite_numbers(kind, folder):
    change, said = WEIGHTS[kind]
    with pytest.raises(CheckpointError, match=said):
        load_model(rewritten(folder("text_gla"), change))


def test_weights_of_eight_bits_are_numbers_too(folder):
    model = rewritten(folder("text_gla"), lambda name, tensor: tensor.to(torch.float8_e5m2))
    assert load_model(model).embedding.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        load_model(rewritten(model, lambda name, tensor: (tensor.float() + math.inf).to(torch.float8_e5m2)))


def test_large_weights_are_finite(folder):
    """Their sum overflows, and they are numbers all the same."""
    load_model(rewritten(folder("text_gla"), lambda name, tensor: torch.full_like(tensor, 3e38)))


def test_the_wrapper_of_transformers_refuses_the_same(folder, tmp_path):
    pytest.importorskip("transformers")
    import omnimix

    hf = omnimix.huggingface
    hf.to_pretrained(load_model(V01 / "text_gla")).save_pretrained(tmp_path / "whole")

    def changed(name: str, path: tuple = (), value=None) -> Path:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        if path:
            put(tmp_path / name, ("omnimix", *path), value)
        return tmp_path / name

    load = hf.AutoModelForCausalLM.from_pretrained
    assert load(changed("good")).num_parameters()
    cases = {
        ("backbone", "depth"): [4.0, 10**8, 1000],
        ("backbone", "dim"): [10**9, 10**7, "a", None],
        ("backbone", "norm_eps"): ["a", math.nan, 0],
        ("backbone",): [None, [], {}],
        ("vocab_size",): [10**12, -1],
    }
    for path, values in cases.items():
        for i, value in enumerate(values):
            with pytest.raises(CheckpointError):
                load(changed(f"{'-'.join(path)}-{i}", path, value))
    for kind in ("nan", "integers", "shapes"):
        with pytest.raises(CheckpointError):
            load(rewritten(changed(kind), WEIGHTS[kind][0]))
    # Whose weights lie in several files.
    in_parts = changed("parts")
    load(in_parts).save_pretrained(in_parts, max_shard_size="20kB")
    (in_parts / "model.safetensors").unlink()
    assert len([*in_parts.glob("model-*.safetensors")]) > 1 and load(in_parts).num_parameters()
    put(in_parts, ("omnimix", "backbone", "depth"), 1000)
    with pytest.raises(CheckpointError, match="and the model 1000"):
        load(in_parts)
