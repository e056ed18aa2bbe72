"""Tar shards: written whole or not at all, the same from the same input, and readable by webdataset."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from omnimix.cli import shard as shard_command
from omnimix.cli.shard import main, shard_folder, size_of
from omnimix.errors import ConfigError, MediaError
from omnimix.modalities import ShardSource, find_source
from omnimix.modalities.data import tar
from omnimix.modalities.data.sources import IMAGE_SUFFIXES


@pytest.fixture
def pictures(tmp_path):
    """Nine pictures of two classes and an empty file to train on, two held out."""
    rng = np.random.default_rng(0)
    for name in [*(f"train/{c}/{i}.x.jpg" for c in ("cat", "10") for i in range(5)), "val/cat/v.png", "val/10/w.JPG"]:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(file)
    (tmp_path / "in" / "train" / "cat" / "0.x.jpg").write_bytes(b"")
    return tmp_path / "in"


def content(source) -> list[tuple[bytes, str]]:
    return sorted((source.media(i), source.classes[source.label(i)]) for i in range(len(source)))


def files_of(root: Path, split: str) -> list[tuple[bytes, str]]:
    return sorted((f.read_bytes(), f.parent.name) for f in (root / split).rglob("*.*") if f.stat().st_size)


def test_what_was_written_is_what_was_there(tmp_path, pictures, capsys):
    out = tmp_path / "o%d.d"
    assert main([str(pictures), str(out), "--kind", "image", "--samples", "4", "--json", "-"]) == 0
    said, warned = capsys.readouterr()
    rows = json.loads(said)
    assert [(row["split"], row["shards"], row["samples"], row["skipped"]) for row in rows] == [
        ("train", 3, 9, 1), ("val", 1, 2, 0)
    ]  # fmt: skip
    assert "0.x.jpg' is empty" in warned
    train = find_source(out, "train", IMAGE_SUFFIXES)
    val = find_source(out, "val", IMAGE_SUFFIXES, train.classes)
    assert isinstance(train, ShardSource) and len(train) == 9 and train.classes == ("10", "cat")
    assert content(train) == files_of(pictures, "train") and content(val) == files_of(pictures, "val")
    # Shuffled, so that whoever reads shards in a row sees classes mixed.
    assert len({train.label(i) for i in range(4)}) == 2
    assert (out.stat().st_mode & 0o777) == (pictures.stat().st_mode & 0o777)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_plain_webdataset_reads_it(tmp_path, pictures):
    [train] = shard_folder(pictures, tmp_path / "out", kind="image", splits=("train",), samples=4)
    urls = [str(shard) for shard in train.shards]
    found = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls", "json")
    )
    assert [key for key, *_ in found] == [f"{i:08d}" for i in range(9)]
    for _, image, label, about in found:
        assert about["class"] == ("10", "cat")[label] and (pictures / about["path"]).parent.name == about["class"]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(pictures / about["path"])))


def test_the_same_input_gives_the_same_bytes(tmp_path, pictures):
    def digest(name: str, **options) -> list[bytes]:
        shard_folder(pictures, tmp_path / name, kind="image", samples=4, **options)
        return [f.read_bytes() for f in sorted((tmp_path / name).glob("*.tar"))]

    first = digest("a", seed=3)
    assert digest("b", seed=3) == first and digest("c", seed=4) != first
    # Shards can be written anew from shards.
    shard_folder(tmp_path / "a", tmp_path / "d", kind="image", nbytes=700, seed=None)
    again = find_source(tmp_path / "d", "train", IMAGE_SUFFIXES)
    assert content(again) == files_of(pictures, "train")
    assert len(list((tmp_path / "d").glob("train-*.tar"))) > 3


def test_an_index_spares_the_scan_and_is_never_trusted(tmp_path, pictures, monkeypatch):
    shard_folder(pictures, tmp_path / "out", kind="image", samples=4)
    shard = tmp_path / "out" / "train-000000.tar"
    index = Path(f"{shard}.index.json")
    right = find_source(tmp_path / "out", "train", IMAGE_SUFFIXES)
    expected = content(right)

    def refuse(*_, **__):
        raise AssertionError("scanned")

    with monkeypatch.context() as patch:
        patch.setattr(tar, "scan", refuse)
        assert content(find_source(tmp_path / "out", "train", IMAGE_SUFFIXES)) == expected
        # A copy has another time, and the same bytes.
        os.utime(shard, ns=(1, 1))
        assert content(find_source(tmp_path / "out", "train", IMAGE_SUFFIXES)) == expected
    good = json.loads(index.read_text())
    wrong = [
        {"offsets": [1 << 50, *good["offsets"][1:]]}, {"offsets": [-512, *good["offsets"][1:]]}, {"offsets": [1.5]},
        {"sizes": [1 << 50, *good["sizes"][1:]]}, {"sizes": [-1, *good["sizes"][1:]]}, {"labels": [None] * 4},
        {"names": good["names"][1:]}, {"names": 5}, {"size": 7}, {"version": 2},
    ]  # fmt: skip
    for change in wrong:
        index.write_text(json.dumps(good | change))
        assert content(find_source(tmp_path / "out", "train", IMAGE_SUFFIXES)) == expected, change
    for junk in (b"", b"{", b"\xff", b"[]", b"[" * 100_000):
        index.write_bytes(junk)
        assert content(find_source(tmp_path / "out", "train", IMAGE_SUFFIXES)) == expected
    # A place inside the shard that is not the member's own is found out as it is read.
    index.write_text(json.dumps(good | {"offsets": good["offsets"][1:] + good["offsets"][:1]}))
    with pytest.raises(MediaError, match="does not have its member .* where its index says"):
        content(find_source(tmp_path / "out", "train", IMAGE_SUFFIXES))


def test_nothing_is_overwritten_unasked_or_half_done(tmp_path, pictures, monkeypatch):
    out = tmp_path / "out"
    shard_folder(pictures, out, kind="image")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(ConfigError, match="--overwrite"):
        shard_folder(pictures, out, kind="image")

    def interrupt(split, done, total):
        if split == "val":
            raise KeyboardInterrupt

    for target in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            shard_folder(pictures, target, kind="image", seed=9, overwrite=True, seen=interrupt)
    monkeypatch.setattr(shard_command, "write_index", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ConfigError, match="No space left"):
        shard_folder(pictures, out, kind="image", seed=9, overwrite=True)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    shard_folder(pictures, out, kind="image", splits=("val",), overwrite=True)
    assert sorted(f.name for f in out.iterdir()) == ["classes.json", "val-000000.tar", "val-000000.tar.index.json"]
    (out / "thesis.txt").write_text("!")
    with pytest.raises(ConfigError, match="thesis.txt"):
        shard_folder(pictures, out, kind="image", overwrite=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "text"}, "kind is 'text'"),
        ({"samples": 0}, "^--samples is 0; it must be at least 1$"),
        ({"nbytes": 0}, "^--bytes is 0; it must be at least 1$"),
        ({"splits": ("nope",)}, "no split 'nope'"),
        ({"kind": "audio"}, "no file"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, pictures, wrong, message):
    with pytest.raises(ConfigError, match=message):
        shard_folder(pictures, tmp_path / "out", **({"kind": "image"} | wrong))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_splits_or_none_at_all(tmp_path, capfd):
    for root, message in (("nodir", "folder '.*nodir' does not exist"), (".", "name its own with --splits")):
        with pytest.raises(ConfigError, match=message):
            main([str(tmp_path / root), str(tmp_path / "out"), "--kind", "image"])
    # The error is the only line.
    assert capfd.readouterr() == ("", "")


def test_an_unreadable_file_stops_where_told(tmp_path, pictures):
    with pytest.raises(MediaError, match="0.x.jpg' is empty"):
        shard_folder(pictures, tmp_path / "out", kind="image", policy="raise")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_sizes_are_read():
    assert [size_of(text) for text in ("5", "64MB", "1.5g", "2 KiB")] == [5, 64 << 20, 3 << 29, 2048]
    with pytest.raises(ConfigError, match="--bytes is 'much'"):
        size_of("much")


def test_sizes_that_no_file_has():
    with pytest.raises(ConfigError, match="no file is that large"):
        size_of("9" * 400)


def test_classes_whose_names_are_no_utf_8(tmp_path, pictures):
    train = os.fsencode(pictures / "train")
    os.rename(train + b"/cat", train + b"/c\xff")
    shard_folder(pictures, tmp_path / "out", kind="image", splits=("train",))
    assert find_source(tmp_path / "out", "train", IMAGE_SUFFIXES).classes == ("10", "c\udcff")
