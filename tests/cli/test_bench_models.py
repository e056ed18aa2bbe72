"""`omnimix bench models` times what it says and writes it down."""

import json

import pytest

from omnimix.__main__ import main
from omnimix.cli.bench_models import bench_models
from omnimix.errors import ConfigError, UnknownName


def test_the_command_writes_rows_and_a_picture(tmp_path):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    words = ["bench", "models", "--models", "vit_tiny_linear_patch16_224", "timm:deit_tiny_patch16_224"]
    words += ["--sizes", "32", "48", "--repeats", "1", "--json", str(file), "--plot", str(picture)]
    assert main(words) == 0
    rows = json.loads(file.read_text())
    assert {(row["model"], row["size"], row["pass"]) for row in rows} == {
        (model, size, kind) for model in words[3:5] for size in (32, 48) for kind in ("forward", "forward+backward")
    }
    for row in rows:
        peer = next(r for r in rows if r["model"] == words[4] and (r["size"], r["pass"]) == (row["size"], row["pass"]))
        assert row["x timm:deit_tiny_patch16_224"] == pytest.approx(peer["ms"] / row["ms"], rel=0.05)
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "models", "size"),
    [
        ("video", ["vivit_tiny_linear_patch16_224", "transformers:videomae_tiny"], 2),
        ("audio", ["ast_tiny_linear", "transformers:ast_tiny"], 1),
    ],
)
def test_videos_and_sounds_have_peers_too(kind, models, size):
    rows = bench_models(kind=kind, models=models, sizes=[size], repeats=1)
    assert [row["model"] for row in rows] == models * 2
    assert all(row["ms"] > 0 for row in rows)
    with pytest.raises(UnknownName, match=models[1].removeprefix("transformers:")):
        bench_models(kind=kind, models=[models[1] + "y"], sizes=[size])


def test_mistakes_are_named():
    with pytest.raises(UnknownName, match="image"):
        bench_models(kind="imag")

    with pytest.raises(UnknownName, match="vig_tiny_patch16_224"):
        bench_models(models=["vig_tny_patch16_224"], sizes=[32])
    with pytest.raises(UnknownName, match="deit_tiny_patch16_224"):
        bench_models(models=["timm:deit_tny_patch16_224"], sizes=[32])
    with pytest.raises(ConfigError, match="sizes"):
        bench_models(sizes=[0])
