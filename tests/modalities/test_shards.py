"""Tar shards: indexed, read at any place, and refused where hostile or broken."""

import gzip
import io
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from omnimix.errors import ConfigError, MediaError
from omnimix.modalities import ShardSource
from omnimix.modalities.data import tar
from omnimix.modalities.data.shards import split_key
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
        ([member("1.jpg"), member("1.json", b"{")], ConfigError, "1.json.* is not JSON"),
        ([member("1.jpg"), member("1.json", b"[" * 100_000)], ConfigError, "1.json.* is not JSON"),
        ([member("1.jpg"), member("1.cls", b"0" * 2000)], ConfigError, "1.cls.* 2,000 bytes"),
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


def test_two_members_of_one_name_but_for_capitals(tmp_path):
    path = tar_of(tmp_path / "train-0.tar", member("a.jpg"), member("a.JPG"), member("a.cls", b"0"))
    with pytest.raises(ConfigError, match="two media, 'a.jpg' and 'a.JPG'"):
        ShardSource([path], IMAGE_SUFFIXES)


GOOD = [member("good.jpg", b"good"), member("good.cls", b"1")]


def read_all(source: ShardSource) -> tuple[dict[str, tuple[bytes, str]], dict[str, str]]:
    """What is read, (bytes, class) by the member's name, and what is refused, with the reason."""
    read, refused = {}, {}
    for index in range(len(source)):
        name = source.name(index).partition(".tar/")[2]
        try:
            read[name] = source.media(index), source.classes[source.label(index)]
        except MediaError as error:
            refused[name] = str(error)
    assert {name.partition(".tar/")[2]: reason for name, reason in source.problems.items()} == refused
    return read, refused


@pytest.mark.parametrize(
    ("members", "read", "refused"),
    [
        ({"Track 2.0 (x).jpg": "a", "Track 2.0 (x).cls": "0"}, {"Track 2.0 (x).jpg": "a"}, {}),
        ({"Track 2.0 (x).jpg": "a", "Track 2.json": '{"class": "0"}'}, {"Track 2.0 (x).jpg": "a"}, {}),
        (
            {"v1.0.jpg": "a", "v1.0.cls": "0", "v1.1.jpg": "b", "v1.1.json": '{"class": "0"}', "v1.2.jpg": "c"},
            {"v1.0.jpg": "a", "v1.1.jpg": "b"},
            {"v1.2.jpg": "no label"},
        ),
        ({"1.jpg": "a", "1.cls": "0", "1.mask.png": "m"}, {"1.jpg": "a"}, {}),
        ({"1.jpg": "a", "1.png": "b", "1.cls": "0"}, {}, {"1.jpg": "two media", "1.png": "two media"}),
        ({"1.left.jpg": "a", "1.right.jpg": "b", "1.cls": "0"}, {}, {"1.left.jpg": "two", "1.right.jpg": "two media"}),
        ({"1.jpg": "a", "1.CLS": "0", "1.cls": "0"}, {}, {"1.jpg": "two of 'cls'"}),
        ({"1.jpg": "a"}, {}, {"1.jpg": "has no label"}),
        ({"1.jpg": "a", "1.cls": "-1"}, {}, {"1.jpg": "holds '-1', which is neither the index nor the name"}),
        ({"1.jpg": "a", "1.json": '{"class": "-1"}'}, {}, {"1.jpg": "holds '-1', which is neither"}),
        ({"1.jpg": "a", "1.cls": b"\x00\x00\x00\x01"}, {}, {"1.jpg": "neither the index nor the name"}),
        ({"1.jpg": "a", "1.cls": b"\x80\x04K\x01."}, {}, {"1.jpg": "neither the index nor the name"}),
        ({"1.jpg": "a", "1.cls": "9" * 40}, {}, {"1.jpg": "neither the index nor the name"}),
        ({"1.jpg": "a", "1.cls": "0", "._1.jpg": "x", "README": "x", "__note__/2.jpg": "x"}, {"1.jpg": "a"}, {}),
    ],
)
def test_what_is_read_and_what_is_refused_is_all_that_is_there(tmp_path, members, read, refused):
    contents = {name: value if isinstance(value, bytes) else value.encode() for name, value in members.items()}
    path = tar_of(tmp_path / "s.tar", *GOOD, *(member(name, data) for name, data in contents.items()))
    found, problems = read_all(ShardSource([path], IMAGE_SUFFIXES, ("0", "1")))
    assert found == {"good.jpg": (b"good", "1")} | {name: (data.encode(), "0") for name, data in read.items()}
    assert problems.keys() == refused.keys()
    assert all(reason in problems[name] for name, reason in refused.items())
    # No label that cannot be one becomes a class.
    assert set(ShardSource([path], IMAGE_SUFFIXES).classes) <= {"0", "1"}


def test_keys_are_those_of_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    names = ["Track 2.0 (x).jpg", "Track 2.0 (x).cls", "a/b.c/1.jpg", "a/b.c/1.cls", "d.e.jpg", "d.cls"]
    path = tar_of(tmp_path / "s.tar", *(member(name, b"0") for name in names))
    theirs = [
        sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False) if "__key__" in sample
    ]
    source = ShardSource([path], IMAGE_SUFFIXES, ("0", "1"))
    assert len(source) == len(theirs) == 3 and not source.problems
    assert [split_key(source.name(i).partition(".tar/")[2])[0] for i in range(3)] == theirs


def test_systems_without_reading_at_an_offset(tmp_path, monkeypatch):
    # As on Windows.
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "O_CLOEXEC")
    monkeypatch.setattr(tar, "_HANDLES", tar._Handles(3))
    data = [os.urandom(700) for _ in range(40)]
    index = TarIndex(tar_of(tmp_path / "s.tar", *(member(f"{i}.jpg", part) for i, part in enumerate(data))))
    order = np.random.default_rng(0).permutation(40).tolist() * 20
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(index.read, order)) == [data[i] for i in order]
