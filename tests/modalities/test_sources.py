"""Labelled files in folders and tables."""

import json
import pickle
from pathlib import Path

import pytest

from omnimix.errors import ConfigError
from omnimix.modalities import CSVSource, FolderSource, Source, find_source, has_split
from omnimix.modalities.data.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Strings, find_splits, read_classes


def put(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"1")


def rows(source: Source, root: Path) -> list[tuple[str, str]]:
    """(path below root, class) of all samples."""
    files = [Path(source.name(i)).relative_to(root).as_posix() for i in range(len(source))]
    assert [source.media(i) for i in range(len(source))] == [root / file for file in files]
    return [(file, source.classes[source.label(i)]) for i, file in enumerate(files)]


def test_folders_in_alphabetical_order_without_what_is_hidden_or_something_else(tmp_path):
    for name in ("b/2.jpg", "b/1.PNG", "a/deep/er/3.jpg", "b/.hidden.jpg", "b/notes.txt", "stray.jpg", ".git/x.jpg"):
        put(tmp_path / "train" / name)
    (tmp_path / "train" / "empty").mkdir()
    # Data sets of links are usual; a circle of them must end.
    (tmp_path / "train" / "c").symlink_to(tmp_path / "train" / "b")
    (tmp_path / "train" / "b" / "up").symlink_to(tmp_path / "train" / "b")
    source = pickle.loads(pickle.dumps(find_source(tmp_path, "train", IMAGE_SUFFIXES)))
    assert source.classes == ("a", "b", "c", "empty")
    assert rows(source, tmp_path / "train") == [
        ("a/deep/er/3.jpg", "a"), ("b/1.PNG", "b"), ("b/2.jpg", "b"), ("c/1.PNG", "c"), ("c/2.jpg", "c")
    ]  # fmt: skip
    assert isinstance(source, FolderSource) and isinstance(source, Source)


def test_classes_that_are_given_decide(tmp_path):
    put(tmp_path / "val" / "cat" / "1.jpg", tmp_path / "val" / "1" / "2.jpg")
    source = find_source(tmp_path, "val", IMAGE_SUFFIXES, ("dog", "cat", "1"))
    assert rows(source, tmp_path / "val") == [("1/2.jpg", "1"), ("cat/1.jpg", "cat")]
    # A folder's name is never the number of a class.
    with pytest.raises(ConfigError, match="the classes 1, which are none of the 2 known ones .dog, cat"):
        find_source(tmp_path, "val", IMAGE_SUFFIXES, ("dog", "cat"))


def test_errors_of_folders_name_the_layouts(tmp_path):
    put(tmp_path / "train" / "cat" / "1.jpg")
    with pytest.raises(ConfigError, match=r"val/CLASS/FILES, val.csv, or tar shards val-\*.tar"):
        find_source(tmp_path, "val", IMAGE_SUFFIXES)
    with pytest.raises(ConfigError, match=r"ends in .*\.mp4.*train/CLASS/FILES"):
        find_source(tmp_path, "train", VIDEO_SUFFIXES)
    with pytest.raises(ConfigError, match="holds no folders"):
        find_source(tmp_path, "train/cat", IMAGE_SUFFIXES)
    put(tmp_path / "val-000000.tar.gz")
    with pytest.raises(ConfigError, match="gunzip"):
        find_source(tmp_path, "val", IMAGE_SUFFIXES)
    assert has_split(tmp_path, "train") and not has_split(tmp_path, "val")


def test_a_missing_root_is_named_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"folder 'nodir' does not exist; .*'{tmp_path}/nodir'"):
        find_splits("nodir", IMAGE_SUFFIXES)
    with pytest.raises(ConfigError, match=rf"folder '{tmp_path}/nodir' does not exist$"):
        find_source(tmp_path / "nodir", "train", IMAGE_SUFFIXES)


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    put(tmp_path / "train" / "down" / "1.jpg", tmp_path / "val" / "down" / "1.jpg")
    with pytest.raises(ConfigError, match="train' has one class, 'down'; a classifier needs at least two"):
        find_splits(tmp_path, IMAGE_SUFFIXES)
    # What needs no classifier, like writing shards, reads it all the same.
    assert find_source(tmp_path, "train", IMAGE_SUFFIXES).classes == ("down",)


@pytest.mark.parametrize(
    "text",
    [
        "clips/a b.mp4 1\nclips/c.mp4 0\nlost.mp4 1\n",
        "clips/a b.mp4,1\nclips/c.mp4,0\nlost.mp4,1\n",
        "clips/a b.mp4\t1\n\nclips/c.mp4\t0\nlost.mp4\t1",
        "label,path,split\n1,clips/a b.mp4,train\n0,clips/c.mp4,train\n1,lost.mp4,train\n",
        '\ufeffvideo,Class\n"clips/a b.mp4",1\nclips/c.mp4,0\nlost.mp4,1\n',
        "path;label;note\nclips/a b.mp4;1;0,5\nclips/c.mp4;0;\nlost.mp4;1;\n",
        "clips/a b.mp4;1\nclips/c.mp4;0\nlost.mp4;1\n",
    ],
)
def test_tables_of_every_style(tmp_path, text):
    put(tmp_path / "clips" / "a b.mp4", tmp_path / "clips" / "c.mp4")
    (tmp_path / "train.csv").write_text(text, encoding="utf-8")
    source = find_source(tmp_path, "train", VIDEO_SUFFIXES)
    assert isinstance(source, CSVSource)
    assert rows(source, tmp_path) == [("clips/a b.mp4", "1"), ("clips/c.mp4", "0"), ("lost.mp4", "1")]
    named = CSVSource(tmp_path / "train.csv", VIDEO_SUFFIXES, ("jump", "run"))
    assert [named.label(i) for i in range(3)] == [1, 0, 1]
    (tmp_path / "classes.txt").write_text("jump\nrun\nwalk\n")
    assert find_source(tmp_path, "train", VIDEO_SUFFIXES).classes == ("jump", "run", "walk")


def test_kinetics_finds_clips_by_their_id(tmp_path):
    (tmp_path / "val.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "riding a bike,---QUuC4vJs,84,94,val,0\nabseiling,x_y,3,13,val,0\nabseiling,gone,1,2,val,0\n"
    )
    put(tmp_path / "val" / "riding a bike" / "---QUuC4vJs_000084_000094.mp4", tmp_path / "val" / "x_y.webm")
    put(tmp_path / "train" / "x_y.webm")
    source = find_source(tmp_path, "val", VIDEO_SUFFIXES)
    assert rows(source, tmp_path) == [
        ("val/riding a bike/---QUuC4vJs_000084_000094.mp4", "riding a bike"),
        ("val/x_y.webm", "abseiling"),
        ("val/gone_000001_000002", "abseiling"),
    ]
    assert source.classes == ("abseiling", "riding a bike")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 1\nb.mp4\n", "line 2 .*'b.mp4'"),
        ("a.mp4,1,2\n", "line 1 .* header"),
        ("path,label\na.mp4\n", "line 2"),
        ("", "is empty"),
        (
            "path,klass\nhere.mp4,x\n",
            r"line 1 .* header \(it has 'path'\) but has no column of label, class, category;",
        ),
        ("\npath;klass\nhere.mp4;x\n", "line 2 .* header .*'path'.* no column of label"),
        ("fil,Label\nhere.mp4,x\n", r"line 1 .* header \(it has 'Label'\) but has no column of path, .*youtube_id;"),
        (
            "fil klass\nhere.mp4 x\n",
            "line 1 .* header .'fil' is no file.* of path, .* no column of label, .*path,label",
        ),
        ("here.mp4 7\n", "the classes 7, which are none of the 2 known ones"),
        ("lost.mp4 1\nalso.mp4 0\n", "of the 2 files .* none is there, the first being .*lost.mp4"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    put(tmp_path / "here.mp4")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        CSVSource(tmp_path / "t.csv", VIDEO_SUFFIXES, ("x", "y"))


def test_a_sample_is_no_header_whatever_its_class_is_called(tmp_path):
    put(tmp_path / "here.mp4", tmp_path / "bare")
    for text in ("lost.mp4,label\nhere.mp4,path\n", "bare label\nhere.mp4 path\n", "a;b.mp4 label\nhere.mp4 path\n"):
        (tmp_path / "t.csv").write_text(text)
        source = CSVSource(tmp_path / "t.csv", VIDEO_SUFFIXES)
        assert source.classes == ("label", "path") and len(source) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings_are_told_what_to_do(tmp_path, encoding):
    for name in ("t.csv", "classes.txt"):
        (tmp_path / name).write_text("ä.mp4,x\n", encoding=encoding)
    with pytest.raises(ConfigError, match=r"t\.csv' is no text in UTF-8 .*; save it as UTF-8"):
        CSVSource(tmp_path / "t.csv", VIDEO_SUFFIXES)
    with pytest.raises(ConfigError, match=r"classes\.txt' is no text in UTF-8 .*; save it as UTF-8"):
        read_classes(tmp_path)


def test_a_label_is_no_huge_number(tmp_path):
    put(tmp_path / "a.mp4")
    (tmp_path / "t.csv").write_text("a.mp4 1700000000\n")
    with pytest.raises(ConfigError, match="1700000000"):
        CSVSource(tmp_path / "t.csv", VIDEO_SUFFIXES)


@pytest.mark.parametrize("wrong", ["{}", "[]", "[1]", '["a", "a"]', "["])
def test_class_files_are_checked(tmp_path, wrong):
    assert read_classes(tmp_path) is None
    (tmp_path / "classes.json").write_text(wrong)
    with pytest.raises(ConfigError, match="classes.json"):
        read_classes(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(["ä", "b"]))
    assert read_classes(tmp_path) == ("ä", "b")


def test_strings_are_a_list():
    words = ["", "ä", "b" * 300, "\udcff"]
    strings = pickle.loads(pickle.dumps(Strings(words)))
    assert list(strings) == words and strings[1:3] == words[1:3] and strings[-1] == words[-1]
    with pytest.raises(IndexError):
        strings[4]


def test_links_in_a_circle_and_into_nowhere(tmp_path):
    put(tmp_path / "train" / "c" / "a.jpg")
    (tmp_path / "train" / "c" / "self").symlink_to("self")
    (tmp_path / "train" / "c" / "b.jpg").symlink_to("gone.jpg")
    source = find_source(tmp_path, "train", IMAGE_SUFFIXES)
    # What leads nowhere is an unreadable file, and not left out in silence.
    assert [Path(source.name(i)).name for i in range(len(source))] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("classes", [None, ("a", "b")])
def test_a_table_needs_rows(tmp_path, classes):
    (tmp_path / "train.csv").write_text("path,label\n")
    with pytest.raises(ConfigError, match="a header and no rows"):
        find_source(tmp_path, "train", IMAGE_SUFFIXES, classes)


def _files(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_folders_of_classes_are_split(tmp_path: Path, caplog):
    names = [f"{cls}/{i}.png" for cls, count in (("cat", 10), ("dog", 25), ("owl", 1)) for i in range(count)]
    _files(tmp_path / "a", names)
    with caplog.at_level("INFO", "omnimix"):
        splits = find_splits(tmp_path / "a", IMAGE_SUFFIXES)
    assert "7 of its 36 files are held out" in caplog.text
    train, val = splits["train"], splits["val"]
    assert train.classes == val.classes == ("cat", "dog", "owl") and set(splits) == {"train", "val"}
    held = {val.name(i) for i in range(len(val))}
    assert len(held) == 7 and not held & {train.name(i) for i in range(len(train))} and len(train) == 29
    assert [sum(val.label(i) == label for i in range(len(val))) for label in range(3)] == [2, 5, 0]
    # Where the folder lies makes no difference, and neither does another file.
    (tmp_path / "a").rename(tmp_path / "b")
    again = find_splits(tmp_path / "b", IMAGE_SUFFIXES)["val"]
    assert {again.name(i) for i in range(len(again))} == {name.replace("/a/", "/b/") for name in held}


@pytest.mark.parametrize(("name", "held"), [("valid", 3), ("validation", 3), ("test", 2)])
def test_other_names_of_splits(name: str, held: int, tmp_path: Path):
    names = [f"train/{cls}/{i}.png" for cls in ("cat", "dog") for i in range(5)]
    _files(tmp_path, [*names, *(f"{name}/{cls}/{i}.png" for cls, i in (("cat", 6), ("dog", 6), ("dog", 7)))])
    splits = find_splits(tmp_path, IMAGE_SUFFIXES)
    assert len(splits["val"]) == held and len(splits["train"]) == (8 if name == "test" else 10)
    assert ("test" in splits) == (name == "test")


def test_what_cannot_be_split(tmp_path: Path):
    _files(tmp_path / "single", ["cat/0.png", "dog/0.png"])
    with pytest.raises(ConfigError, match="no class .* has two files"):
        find_splits(tmp_path / "single", IMAGE_SUFFIXES)
    _files(tmp_path / "named", ["training/cat/0.png", "val/cat/0.png"])
    with pytest.raises(ConfigError, match="has no split 'train'"):
        find_splits(tmp_path / "named", IMAGE_SUFFIXES)
