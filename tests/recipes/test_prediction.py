"""What the commands that name the classes of files share."""

import pytest

from omnimix.errors import ConfigError
from omnimix.recipes.common.prediction import check_counts, make_folder


def test_numbers_are_checked():
    check_counts(1, 1)
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="is 0; it must be at least 1"):
            check_counts(*wrong)


def test_what_is_written_at_the_end_has_its_folder_before(tmp_path):
    make_folder("--picture", str(tmp_path / "new" / "deeper" / "p.png"))
    assert (tmp_path / "new" / "deeper").is_dir()
    (tmp_path / "file").touch()
    for wrong, said in ((tmp_path, "which is a folder"), (tmp_path / "file" / "p.png", "whose folder cannot be made")):
        with pytest.raises(ConfigError, match=f"--picture is '.*', {said}"):
            make_folder("--picture", str(wrong))
    for none in (None, "-"):
        make_folder("--json", none)
