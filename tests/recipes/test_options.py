"""The options that data sets share: short, long and in files the same; what a data set refuses; round trips."""

import shlex

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from omnimix.__main__ import main
from omnimix.errors import ConfigError
from omnimix.recipes.audio.data import AudioFolderData, SoundsData
from omnimix.recipes.common.options import DataOptions, LoadingOptions, RecipeData, options_argument
from omnimix.recipes.text.data import TextData, TextOptions
from omnimix.recipes.video.data import VideoFolderData, VideoOptions
from omnimix.recipes.video.moving_digits import MovingDigitsData
from omnimix.recipes.vision.data import DigitsData, TensorData
from omnimix.recipes.vision.folders import ImageFolderData

FOLDER = "--config vision_folder --data.root here"


@pytest.fixture
def images(tmp_path):
    """A folder with two classes of two images in each split."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.full((8, 8, 3), 40 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def shown(capsys, typed: str, kind: str = "vision") -> dict:
    """The arguments of the data set that a command line stands for."""
    with pytest.raises(SystemExit) as stop:
        main([kind, "fit", *shlex.split(typed), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]


@pytest.mark.parametrize(
    ("kind", "own", "short", "long"),
    [
        ("vision", "", "--data.batch_size 32", "--data.loading.batch_size 32"),
        ("vision", FOLDER, "--data.workers 3 --data.keep=null", "--data.loading '{workers: 3}'"),
        ("video", "", "--data.views=3 --data.keep false", "--data.loading.views 3 --data.loading.keep=false"),
        ("audio", "", "--data.batch_size 5", "--data.init_args.loading.batch_size=5"),
        (
            "text",
            "",
            "--data.length 128 --data.val_fraction 0.1",
            "--data.options.length 128 --data.options.val_fraction 0.1",
        ),
    ],
)
def test_short_and_long_forms_and_files_are_the_same(tmp_path, capsys, kind, own, short, long):
    found = shown(capsys, f"{own} {short}", kind)
    assert found == shown(capsys, f"{own} {long}", kind) != shown(capsys, own, kind)
    # A run's configuration, read again, is the same; and flags win over it.
    file = tmp_path / "own.yaml"
    with pytest.raises(SystemExit):
        main([kind, "fit", *shlex.split(f"{own} {short}"), "--print_config"])
    file.write_text(capsys.readouterr().out)
    assert shown(capsys, f"--config {file}", kind) == found
    again = shown(capsys, f"--config {file} --data.batch_size 7", kind)
    name = "options" if kind == "text" else "loading"
    assert again == found | {name: found[name] | {"batch_size": 7}}


@pytest.mark.parametrize(
    "said", [{"batch_size": 5, "policy": "raise"}, {"loading": {"batch_size": 5, "policy": "raise"}}]
)
def test_files_take_both_forms_and_another_data_set_takes_nothing_of_them(tmp_path, capsys, said):
    data = {"data": {"class_path": "ImageFolderData", "init_args": {"root": "here", **said}}}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(data))
    found = shown(capsys, f"--config {file} --data.workers 1")["loading"]
    assert found == {"batch_size": 5, "workers": 1, "policy": "raise", "max_unreadable": 0.1, "keep": False}
    typed = shown(capsys, f"--data '{yaml.safe_dump(data['data'], default_flow_style=True).strip()}'")["loading"]
    assert typed == found | {"workers": 2}
    assert shown(capsys, f"--config {file} --data DigitsData")["loading"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            f"vision fit {FOLDER} --data.keep true",
            "data.keep is True; for ImageFolderData it is always False, since each epoch crops its files anew: leave",
        ),
        (
            "vision fit --data.policy skip",
            "data.policy is 'skip'; for DigitsData it is always 'raise', since its images",
        ),
        ("audio fit --data.loading.workers 2", "data.workers is 2; for SoundsData it is always 0"),
        ("video fit --data.policy skip", "for MovingDigitsData it is always 'raise', since its files are generated"),
        ("vision fit --data.batchsize 3", "unknown option 'batchsize'; did you mean 'batch_size'?"),
        (
            "vision fit --data.loading.batchsize 3",
            "LoadingOptions has no field 'batchsize'; did you mean 'batch_size'?",
        ),
        ("text fit --data.lenght 3", "did you mean 'length'?"),
        (
            "text fit --data.options.val_fracton 0.1",
            "TextOptions has no field 'val_fracton'; did you mean 'val_fraction'?",
        ),
        ("vision fit --data.batch_size x", "LoadingOptions.batch_size is 'x'; it must be an integer"),
        ("vision fit --data.batch_size 0", "data.batch_size is 0; it must be at least 1"),
        ("vision fit --data.policy rais", "did you mean 'raise'?"),
        (f"vision fit {FOLDER} --data.max_unreadable 2", "data.max_unreadable is 2.0; it must be in [0, 1]"),
        ("vision fit --data.seed 3", "data.seed is 3, but the run has one for all: set --seed_everything"),
        ("vision fit --data.loading 3", "LoadingOptions must be a mapping of its fields"),
        ("vision fit --data.loading.keep", "--data.loading.keep needs a value"),
        ("vision fit --data Digit", "unknown class 'Digit'; did you mean 'DigitsData'?"),
    ],
)
def test_mistakes_are_one_line_of_ours(tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(typed)) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_help_names_the_short_forms_and_a_data_set_s_own_defaults(capsys):
    def printed(*words):
        with pytest.raises(SystemExit) as stop:
            main(["vision", "fit", *words])
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    text = printed("--help", "all")
    assert "--data.batch_size, --data.workers, --data.policy" in text and "short for --data.loading.OPTION" in text
    text = printed("--data.help=ImageFolderData")
    assert "--data.loading.workers WORKERS" in text and "(type: int | null, default: 2)" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_stores_its_options_and_takes_its_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = []
    filled = DigitsData.filled.__func__
    monkeypatch.setattr(
        DigitsData, "filled", classmethod(lambda cls, given: seeds.append(given.seed) or filled(cls, given))
    )
    short = "--threads 1 --model.dim 16 --model.depth 1 --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    short += " --trainer.limit_val_batches 1 --trainer.accelerator cpu --seed_everything 5"
    assert main(["vision", "fit", *shlex.split(short), "--data.batch_size", "24"]) == 0
    stored = yaml.safe_load((tmp_path / "runs/vision/config.yaml").read_text())["data"]["init_args"]
    assert stored["loading"]["batch_size"] == 24 and "batch_size" not in stored and "seed" not in stored["loading"]
    assert main(["vision", "fit", "--resume", "--trainer.max_epochs", "2"]) == 0
    again = yaml.safe_load((tmp_path / "runs/vision/config.yaml").read_text())["data"]["init_args"]
    assert again == stored and {seed for seed in seeds if seed is not None} == {5}


def test_in_python_a_data_set_takes_one_object(images):
    data = ImageFolderData(root=str(images), size=8, loading=LoadingOptions(batch_size=3))
    assert data.loading == LoadingOptions(
        batch_size=3, workers=2, seed=0, policy="skip", max_unreadable=0.1, keep=False
    )
    quick = ImageFolderData(root=str(images), size=8, loading=LoadingOptions(batch_size=3, workers=0))
    quick.setup("fit")
    assert next(iter(quick.train_dataloader()))["image"].shape == (3, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"data\.keep is True; for ImageFolderData it is always False.*leave it out"):
        ImageFolderData(root=str(images), loading=LoadingOptions(keep=True))
    with pytest.raises(ConfigError, match=r"data\.views is 2, and ImageFolderData has no such option"):
        ImageFolderData(root=str(images), loading=VideoOptions(views=2))
    with pytest.raises(ConfigError, match="set workers to 0"):
        MovingDigitsData(loading=VideoOptions(workers=2))
    assert MovingDigitsData(loading=VideoOptions(seed=3)).loading == VideoOptions(
        batch_size=16, workers=0, seed=3, policy="raise", max_unreadable=0.0, keep=True, views=1, crops=1
    )
    tensors = {"images": torch.rand(4, 1, 8, 8), "labels": torch.arange(4) % 2}
    tensors = {f"{split}_{name}": tensor for split in ("train", "val") for name, tensor in tensors.items()}
    with pytest.raises(ConfigError, match="for TensorData it is always 'raise'"):
        TensorData(tensors=tensors, loading=LoadingOptions(policy="skip"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"workers": -1},
        {"length": 0},
        {"vocab_size": 0},
        {"val_fraction": 1.0},
        {"val_tokens": 0},
    ],
)
def test_what_is_wrong_with_an_option_is_named(wrong):
    [name] = wrong
    with pytest.raises(ConfigError, match=rf"data\.{name} is {wrong[name]!r}; it must be"):
        TextOptions(**wrong)


def test_a_data_set_without_the_options_is_told_what_to_do():
    class Own(DigitsData):
        def __init__(self, *, holdout: float = 0.5):
            super().__init__(holdout=holdout)

    with pytest.raises(ConfigError, match=r"Own does not take the options .* LoadingOptions\(\), .* DigitsData"):
        options_argument(Own)


def test_a_data_set_of_one_s_own_has_its_defaults_and_the_short_forms(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_images.py").write_text(
        "from omnimix.recipes.common.options import LoadingOptions\n"
        "from omnimix.recipes.vision.data import DigitsData\n"
        "class OwnImages(DigitsData):\n"
        "    defaults = DigitsData.filled(LoadingOptions(batch_size=11))\n"
    )
    assert shown(capsys, "--data own_images.OwnImages")["loading"]["batch_size"] == 11
    assert shown(capsys, "--data own_images.OwnImages --data.batch_size 3")["loading"]["batch_size"] == 3
    assert main(["vision", "fit", "--data", "own_images.OwnImages", "--data.workers", "1"]) == 2
    assert "for OwnImages it is always 0" in capsys.readouterr().err


def all_data_sets(base: type = RecipeData) -> list[type]:
    return [base, *(cls for child in base.__subclasses__() for cls in all_data_sets(child))]


def test_every_data_set_has_every_default_and_only_fixes_what_there_is():
    assert {AudioFolderData, SoundsData, TextData, VideoFolderData} <= {*all_data_sets()}
    for cls in all_data_sets():
        if cls is RecipeData or not cls.__module__.startswith("omnimix.recipes") or cls.__name__ == "SingleFrames":
            continue
        # Only what may be absent is None.
        unset = {name for name, value in vars(cls.defaults).items() if value is None}
        assert unset <= {"val_batch_size", "val_tokens", "end", "cache"}
        assert cls.fixed.keys() <= vars(cls.defaults).keys()
        assert options_argument(cls) in ("loading", "options") and isinstance(cls.defaults, DataOptions)
