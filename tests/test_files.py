"""Files appear whole or not at all."""

import errno

import pytest
from torch import nn

from omnimix.modalities.common.weights import save_weights
from omnimix.utils.files import replace_file


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "model.safetensors"
    save_weights(nn.Linear(2, 2), file)
    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="too large") as wrong:
            save_weights(nn.Linear(200, 200), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert wrong.value.errno == errno.EFBIG and wrong.value.filename == str(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_errors_of_the_writer_are_its_own(tmp_path):
    def write(path):
        raise ValueError("no numbers")

    with pytest.raises(ValueError, match="no numbers"):
        replace_file(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())
