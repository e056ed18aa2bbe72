"""Tar shards: indexed, refused where hostile or broken, written whole or not at all, readable by webdataset."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
from omnimix.modalities.data.tar import TarIndex


def member(name: str, data: bytes = b"x", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def tar_of(path: Path, *members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


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


# -- reading


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_and_read_at_any_place(tmp_path, format):
    names = ["a/b.jpg", f"{'d' * 90}/{'n' * 60}.jpg", *(["ü" * 70 + ".jpg"] if format else []), "empty.jpg"]
    data = [*(os.urandom(n) for n in (513, 1, 512)[: len(names) - 1]), b""]
    members = [member(name, part) for name, part in zip(names, data, strict=True)]
    members.insert(1, member("a", b"", type=tarfile.DIRTYPE))
    path = tar_of(tmp_path / "s.tar", *members, format=format)
    index = pickle.loads(pickle.dumps(TarIndex(path)))
    assert list(index.names) == names
    assert [index.read(i) for i in reversed(range(len(index)))] == data[::-1]


def test_samples_are_groups_of_members(tmp_path):
    tar_of(
        tmp_path / "b.tar",
        member("x/1.jpg", b"one"), member("x/1.cls", b"1\n"), member("x/1.seg.png", b"no"),
        member("__notes__", b"?"), member("README", b"?"), member("x/._1.jpg", b"?"),
        member("2.JPEG", b"two"), member("2.json", b'{"class": "cat"}'), member("2.cls", b"0"),
    )  # fmt: skip
    tar_of(tmp_path / "a.tar", member("x/1.jpg", b"another"), member("x/1.cls", b"2"))
    source = ShardSource(sorted(tmp_path.glob("*.tar")), IMAGE_SUFFIXES)
    assert [source.media(i) for i in range(3)] == [b"another", b"one", b"two"]
    assert [source.label(i) for i in range(3)] == [2, 1, 0] and source.classes == ("cat", "1", "2")
    assert len({source.name(i) for i in range(3)}) == 3 and source.name(1) == f"{tmp_path / 'b.tar'}/x/1.jpg"
    # An index is one, also where the names of classes are numbers.
    assert ShardSource([tmp_path / "b.tar"], IMAGE_SUFFIXES, ("1", "0")).label(0) == 1


def test_labels_by_name(tmp_path):
    tar_of(
        tmp_path / "a.tar",
        member("1.jpg"),
        member("1.json", b'{"class": "10"}'),
        member("2.jpg"),
        member("2.cls", b"b"),
    )
    with pytest.raises(ConfigError, match="the classes 10, which are none"):
        ShardSource([tmp_path / "a.tar"], IMAGE_SUFFIXES, tuple("abcdefghijkl"))
    (tmp_path / "classes.json").write_text('["10", "a", "b"]')
    source = ShardSource([tmp_path / "a.tar"], IMAGE_SUFFIXES)
    assert [source.label(i) for i in range(2)] == [0, 2]


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([member("1.jpg")], ConfigError, "'1' .* has no label; it needs a member 1.cls"),
        ([member("1.jpg"), member("1.png"), member("1.cls", b"0")], ConfigError, "two media, '1.jpg' and '1.png'"),
        ([member("1.jpg"), member("1.cls", b"7")], ConfigError, "the classes 7, which are none"),
        ([member("1.jpg"), member("1.json", b"{")], MediaError, "1.json.* is no JSON"),
        ([member("1.jpg"), member("1.json", b"[" * 100_000)], MediaError, "1.json.* is no JSON"),
        ([member("1.jpg"), member("1.cls", b"0" * 2000)], MediaError, "1.cls.* 2,000 bytes"),
        ([member("1.txt")], ConfigError, "no member of the 1 shards"),
        ([], ConfigError, "no member of the 1 shards"),
    ],
)
def test_samples_that_are_none(tmp_path, members, error, message):
    path = tar_of(tmp_path / "s.tar", *members)
    with pytest.raises(error, match=message):
        ShardSource([path], IMAGE_SUFFIXES, ("a", "b"))


def test_processes_and_threads_read_what_was_opened_before(tmp_path):
    paths = [
        tar_of(tmp_path / f"{s}.tar", *(member(f"{i}.jpg", b"%d-%d" % (s, i)) for i in range(20))) for s in range(3)
    ]
    indices = [TarIndex(path) for path in paths]
    expected = [b"%d-%d" % (s, i) for s in range(3) for i in range(20)]
    assert [index.read(i) for index in indices for i in range(20)] == expected
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            assert [pool.submit(indices[s].read, i).result(60) for s, i in ((1, 3), (2, 19))] == [b"1-3", b"2-19"]
    order = np.random.default_rng().permutation(60).tolist() * 20
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda n: indices[n // 20].read(n % 20), order)) == [expected[n] for n in order]


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "_HANDLES", tar._Handles(3))
    indices = [TarIndex(tar_of(tmp_path / f"{s}.tar", member("a.jpg", b"%d" % s))) for s in range(12)]
    before = len(os.listdir("/proc/self/fd"))
    assert [index.read(0) for _ in range(3) for index in indices] == [b"%d" % s for s in range(12)] * 3
    assert len(os.listdir("/proc/self/fd")) - before == 3


def test_a_shard_that_changed_is_not_read(tmp_path):
    path = tar_of(tmp_path / "s.tar", member("a.jpg", b"old"))
    index = TarIndex(path)
    os.utime(tar_of(path, member("a.jpg", b"new")), ns=(5, 5))
    with pytest.raises(MediaError, match="has changed since it was indexed"):
        index.read(0)
    path.unlink()
    with pytest.raises(MediaError, match="cannot open the shard"):
        TarIndex(path)


# -- what is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("/etc/passwd.jpg"), "absolute"),
        (member("C:\\a.jpg"), "absolute"),
        (member("a/../../b.jpg"), "leads out"),
        (member("a\\..\\b.jpg"), "leads out"),
        (member("a.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link to '/etc/passwd'"),
        (member("a.jpg", b"", type=tarfile.LNKTYPE, linkname="good.jpg"), "a link to 'good.jpg'"),
        (member("a.jpg", b"", type=tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("a.jpg", b"", type=tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("good.jpg"), "occurs twice"),
        (member("a.jpg", b"x" * 2001), "2,001 bytes, more than 2,000"),
        (
            member("a.jpg", pax_headers={"GNU.sparse.major": "0", "GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}),
            "sparse",
        ),
    ],
)
def test_hostile_members_are_refused_by_name(tmp_path, bad, message):
    path = tar_of(tmp_path / "s.tar", member("good.jpg"), bad, format=tarfile.PAX_FORMAT)
    with pytest.raises(MediaError, match=f"s.tar.* member '{bad[0].name[:1]}.*{message}"):
        TarIndex(path, limit=2000)


@pytest.mark.parametrize("size", [-512, -1, 1 << 62])
def test_headers_that_lie_about_sizes(tmp_path, size):
    good, bad = member("good.jpg")[0], member("bad.jpg")[0]
    good.size, bad.size = 0, size
    headers = [info.tobuf(tarfile.GNU_FORMAT) for info in (good, bad)]
    (tmp_path / "s.tar").write_bytes(b"".join(headers) + bytes(1024))
    with pytest.raises(MediaError, match="s.tar"):
        TarIndex(tmp_path / "s.tar")


def test_an_end_anywhere_but_behind_the_last_member_is_an_error(tmp_path):
    path = tar_of(tmp_path / "s.tar", *(member(f"{i}.jpg", bytes([65 + i]) * 700) for i in range(3)))
    whole = path.read_bytes()
    last = 3 * 1536
    for cut in range(0, last + 1, 128):
        path.write_bytes(whole[:cut])
        with pytest.raises(MediaError, match=r"s.tar.*(cut short|empty|end of|truncated)"):
            TarIndex(path)
    path.write_bytes(whole[: last + 1024])
    assert len(TarIndex(path)) == 3


def test_what_tarfile_takes_for_the_end_in_silence(tmp_path):
    path = tar_of(tmp_path / "s.tar", *(member(f"{i}.jpg") for i in range(3)))
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"?" + whole[1025:])
    with pytest.raises(MediaError, match=r"after its member '0.jpg': a header is corrupt"):
        TarIndex(path)
    path.write_bytes(whole + whole)
    with pytest.raises(MediaError, match="several archives in one file"):
        TarIndex(path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(MediaError, match="compressed.*gunzip"):
        TarIndex(path)


def test_random_damage_is_an_error_of_ours_or_none(tmp_path):
    path = tar_of(tmp_path / "s.tar", *(member(f"{i}{'n' * 60 * i}.jpg") for i in range(4)), format=tarfile.PAX_FORMAT)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(whole) // 2, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged)
        try:
            index = TarIndex(path, limit=1 << 20)
            assert all(len(index.read(i)) == index[i].size for i in range(len(index)))
        except MediaError:
            refused += 1
    assert refused > 100


# -- writing


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
    for root, message in (("nodir", "there is no folder '.*nodir'"), (".", "name its own with --splits")):
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


def test_two_members_of_one_name_but_for_capitals(tmp_path):
    path = tar_of(tmp_path / "train-0.tar", member("a.jpg"), member("a.JPG"), member("a.cls", b"0"))
    with pytest.raises(ConfigError, match=r"two of 'jpg', 'a.jpg' and 'a.JPG'"):
        ShardSource([path], IMAGE_SUFFIXES)


def test_sizes_that_no_file_has():
    with pytest.raises(ConfigError, match="no file is that large"):
        size_of("9" * 400)


def test_classes_whose_names_are_no_utf_8(tmp_path, pictures):
    train = os.fsencode(pictures / "train")
    os.rename(train + b"/cat", train + b"/c\xff")
    shard_folder(pictures, tmp_path / "out", kind="image", splits=("train",))
    assert find_source(tmp_path / "out", "train", IMAGE_SUFFIXES).classes == ("10", "c\udcff")
