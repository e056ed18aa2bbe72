"""Damaged files of every format: results or a `MediaError`, in bounded memory."""

import json
import random
import subprocess
import sys
from pathlib import Path

from . import media_mutations
from .media_mutations import damaged, tiny_files


def test_damaged_files_give_a_result_or_a_media_error_in_bounded_memory():
    script = Path(media_mutations.__file__)
    done = subprocess.run([sys.executable, script, "500", "0"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    outcomes = {f"{kind}: {outcome}" for kind in media_mutations.READERS for outcome in ("read", "refused")}
    assert found["outcomes"].keys() == outcomes, [name for name in found["outcomes"] if name not in outcomes]
    assert sum(found["outcomes"].values()) == 4 * 500
    assert min(found["outcomes"].values()) > 50
    assert found["peak"] < 2**30


def test_whole_files_are_read_and_damage_is_of_every_kind(tmp_path):
    draw = random.Random(0)
    for kind, files in tiny_files(tmp_path).items():
        for form, whole in files.items():
            for reader in media_mutations.READERS[kind][: 1 if form == "avi" else None]:
                reader(whole)
            made = [damaged(whole, draw) for _ in range(200)]
            lengths = {len(data) - len(whole) for data in made}
            assert min(lengths) < -50 and max(lengths) >= 40 and 0 in lengths
            assert sum(data == whole for data in made) < 20
