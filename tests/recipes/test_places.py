"""`--data PATH`: a folder or file of one's own."""

import gzip
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from omnimix.__main__ import main
from omnimix.errors import ConfigError
from omnimix.recipes.audio.data import AudioData
from omnimix.recipes.common.places import with_data_set
from omnimix.recipes.text.data import TextData
from omnimix.recipes.video.data import VideoData
from omnimix.recipes.vision.data import ImageData

TINY = ["--model.dim=16", "--model.depth=1", "--trainer.accelerator=cpu", "--threads=1"]
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("data", "name", "config"),
    [
        (ImageData, "ImageFolderData", "vision_folder"),
        (VideoData, "VideoFolderData", "video_folder"),
        (AudioData, "AudioFolderData", "audio_folder"),
    ],
)
def test_a_folder_of_media(data, name, config, tmp_path):
    wanted = ["--data", name, f"--data.root={tmp_path}", "--model.dim=16"]
    assert with_data_set(["--data", str(tmp_path), "--model.dim=16"], data) == ["--config", config, *wanted]
    typed = ["--config", "mine.yaml", f"--data={tmp_path}"]
    assert with_data_set(typed, data) == ["--config", "mine.yaml", *wanted[:3]]
    with pytest.raises(ConfigError, match="data is './nix'; there is no such folder or file; .*/nix'"):
        with_data_set(["--data", "./nix"], data)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="name a folder of"):
        with_data_set(["--data", str(tmp_path / "file")], data)


@pytest.mark.parametrize(("data", "option"), [(VideoData, "--data.root"), (ImageData, "--data.root")])
def test_a_root_alone_is_a_folder_of_ones_own(data, option, tmp_path):
    wanted = with_data_set([f"--data={tmp_path}"], data)
    assert with_data_set([option, str(tmp_path)], data) == wanted
    # Somebody else says which data set it is: the command line, a configuration, a run.
    name = wanted[3]
    for words in (["--data", name], ["--config", wanted[1]]):
        assert with_data_set([*words, f"{option}={tmp_path}"], data) == [*words, f"{option}={tmp_path}"]
    assert with_data_set([f"{option}={tmp_path}"], data, fresh=False) == [f"{option}={tmp_path}"]


@pytest.mark.parametrize("typed", [["--data", name] for name in ("TextFiles", "nix", "{class_path: TextFiles}")])
def test_names_stay(typed):
    assert with_data_set(typed, TextData) == typed


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"a.txt": "x" * 9, "b.jsonl": "{}\n"}, "TextFiles"),
        ({"deep/a.md": "x"}, "TextFiles"),
        ({"a.txt": "x", "b.jsonl": '{"text": "long"}\n' * 9}, "JsonLines"),
        ({"a.ndjson": CHAT}, "ChatLines"),
        ({"a.jsonl.gz": gzip.compress(CHAT.encode())}, "ChatLines"),
        ({"a.jsonl": "no json"}, "JsonLines"),
        ({"a.parquet": "x"}, "Parquet"),
        ({"a-0.tar": "x"}, "Shards"),
    ],
)
def test_text_is_read_by_what_there_is_most_of(files, name, tmp_path):
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    places = [tmp_path, *([tmp_path / next(iter(files))] if len(files) == 1 else [])]
    for place in places:
        found = with_data_set(["--data", str(place)], TextData)
        cut = ["--data.section=20000"] if name == "TextFiles" else []
        assert found == ["--data", name, f"--data.path={place}", *cut]


def test_text_of_no_known_kind(tmp_path):
    (tmp_path / "a.log").write_text("x")
    for place in (tmp_path, tmp_path / "a.log"):
        with pytest.raises(ConfigError, match=r"nothing ends in .*\.txt"):
            with_data_set(["--data", str(place)], TextData)


def test_folders_of_classes_train(tmp_path, capsys):
    for i in range(20):
        file = tmp_path / "photos" / ("dark", "light")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (100 + 100 * (i % 2) + i,) * 3).save(file)
    options = [f"--runs={tmp_path / 'runs'}", "--trainer.max_epochs=1", "--data.size=16", "--data.workers=0"]
    assert main(["vision", "fit", "--data", str(tmp_path / "photos"), *options, *TINY]) == 0
    assert "4 of its 20 files are held out" in capsys.readouterr().err
    validate = ["vision", "validate", "--run", str(tmp_path / "runs" / "vision")]
    assert main(validate) == 0
    # The model on another folder, in any of the ways that say which.
    for other in (f"--data={tmp_path / 'photos'}", f"--data.root={tmp_path / 'photos'}"):
        assert main([*validate, other, "--json", str(tmp_path / "rows.json")]) == 0
        assert json.loads((tmp_path / "rows.json").read_text())[0]["val/acc1"] is not None


def test_a_file_of_text_trains(tmp_path):
    (tmp_path / "book.txt").write_text("a line of the book\n" * 4000)
    options = [f"--runs={tmp_path / 'runs'}", "--trainer.max_steps=2", "--data.length=32", "--model.mixer=gla"]
    words = ["--data.tokenizer=bytes", f"--data.cache={tmp_path}", "--data.val_tokens=100"]
    assert main(["text", "fit", "--data", str(tmp_path / "book.txt"), *options, *words, *TINY]) == 0


def test_a_file_of_tensors(tmp_path):
    save_file({"train_images": torch.rand(2, 1, 8, 8)}, tmp_path / "a.safetensors")
    found = with_data_set(["--data", str(tmp_path / "a.safetensors")], ImageData)
    assert found == ["--data", "TensorData", f"--data.path={tmp_path / 'a.safetensors'}"]
