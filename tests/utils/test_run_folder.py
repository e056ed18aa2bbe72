"""A run that replaces another: both are whole, whenever a process is killed."""

from pathlib import Path

import pytest

from omnimix.errors import ConfigError
from omnimix.utils.run_folder import RunFolder


def made(place: Path, text: str, last: bool = True) -> RunFolder:
    """A run whose configuration says `text`."""
    folder = RunFolder(place / "mine")
    folder.create(resume=False)
    folder.config.write_text(text)
    if last:
        folder.last.write_text(text)
    return folder


def test_a_run_gives_way_at_commit(tmp_path):
    made(tmp_path, "old")
    folder = made(tmp_path, "new")
    folder.commit()
    assert folder.config.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not folder.restore() and not folder.recover()


@pytest.mark.parametrize("last", [True, False])
def test_a_run_whose_successor_was_killed_comes_back(last, tmp_path):
    made(tmp_path, "old")
    made(tmp_path, "new", last)
    folder = RunFolder(tmp_path / "mine")
    # Before the configuration of the run to resume is read.
    assert folder.recover() and folder.config.read_text() == folder.last.read_text() == "old"
    folder.check(overwrite=False, resume=True)


def test_a_run_that_was_only_set_aside_is_there(tmp_path):
    made(tmp_path, "old")
    (tmp_path / "mine").rename(tmp_path / ".mine.older")
    folder = RunFolder(tmp_path / "mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        folder.check(overwrite=False, resume=False)
    assert folder.config.read_text() == "old"


def test_a_third_run_replaces_the_first(tmp_path):
    made(tmp_path, "first")
    made(tmp_path, "killed", last=False)
    folder = made(tmp_path, "third")
    assert folder.restore() and folder.config.read_text() == "first"


def test_half_a_deleted_run_is_never_restored(tmp_path, monkeypatch):
    made(tmp_path, "old")
    folder = made(tmp_path, "new", last=False)

    def killed(path, **options):
        if Path(path).is_dir():
            (Path(path) / "config.yaml").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("omnimix.utils.run_folder.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.commit()
    assert not folder.recover() and folder.config.read_text() == "new"
    made(tmp_path, "next").commit()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
