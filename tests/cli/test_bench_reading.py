"""`omnimix bench reading` reads the same images by every reader and writes down what it found."""

import json

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from omnimix.__main__ import main
from omnimix.cli.bench_reading import PEER, bench_reading, loaders_of
from omnimix.errors import ConfigError


def pil_to_tensor_once(image):
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def test_every_reader_gives_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "rows.json"
    words = ["--images", "24", "--size", "32", "--workers", "1", "--batch", "8", "--seconds", "0", "--json", str(file)]
    assert main(["bench", "reading", *words]) == 0
    rows = json.loads(file.read_text())
    assert [row["reader"] for row in rows] == ["omnimix shards", "omnimix folders", PEER]
    assert all(row["images/s"] > 0 and row["passes"] == 3 for row in rows) and rows[-1][f"x {PEER}"] == 1
    [folder] = (entry for entry in (tmp_path / "omnimix").iterdir() if entry.is_dir())
    for name in ("transforms", "usual_transforms"):
        # Bytes of both, in planes: what is decoded is compared, without its random crops.
        monkeypatch.setattr(f"omnimix.cli.bench_reading.{name}", lambda size: pil_to_tensor_once)
    seen = {}
    for name, loader in loaders_of(folder, 32, 0, 8).items():
        batches = [batch.values() if isinstance(batch, dict) else batch for batch in loader]
        pairs = [pair for images, labels, *_ in batches for pair in zip(images, labels.tolist(), strict=True)]
        seen[name] = sorted((label, image.flatten().tolist()) for image, label in pairs)
    assert len(seen[PEER]) == 24 and len({label for label, _ in seen[PEER]}) == 10
    assert all(images == seen[PEER] for images in seen.values())


@pytest.mark.parametrize("wrong", [{"images": 9}, {"batch": 0}, {"workers": -1}, {"size": 4}])
def test_numbers_that_are_too_small(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        bench_reading(**wrong)
