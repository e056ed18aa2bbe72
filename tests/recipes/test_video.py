"""`omnimix video` from files to predictions; stopped and resumed on the way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import omnimix
from omnimix.__main__ import main
from omnimix.backbones import BackboneConfig
from omnimix.errors import CheckpointError, ConfigError
from omnimix.modalities.common.encode import write_video
from omnimix.modalities.video.files import VideoReader
from omnimix.modalities.video.model import VideoClassifier
from omnimix.recipes.common import synthetic
from omnimix.recipes.common.timeline import scenes
from omnimix.recipes.video import moving_digits
from omnimix.recipes.video.data import VideoFolderData, VideoOptions
from omnimix.recipes.video.film_timeline import Timeline
from omnimix.recipes.video.moving_digits import MOTIONS, RATE, MovingDigitsData, Way, draw_way, render
from omnimix.recipes.video.preprocess import ClipConfig, VideoPreprocess, strip
from omnimix.recipes.video.recipe import VideoUnderstanding
from omnimix.recipes.vision.folders import Augment

# Everything that draws random numbers is on: stochastic depth, augmentation.
TINY = [
    *("--data.train=48", "--data.val=24", "--data.augment.scale=0.5", "--data.augment.colour=0.2"),
    *("--model.dim=16", "--model.depth=1", "--model.drop_path=0.3"),
    *("--data.clip.frames=8", "--data.clip.sampling=dense", "--data.clip.rate=16"),
    *("--data.batch_size=8", "--trainer.max_epochs=2", "--checkpoint_steps=2", "--threads=1"),
]
NO_BASELINE = ["--model.one_frame_epochs=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the cache of generated clips, and one finished run, runs/whole."""
    folder = tmp_path_factory.mktemp("video")
    with pytest.MonkeyPatch.context() as patch:
        # Not XDG_CACHE_HOME, where the kernels are too.
        patch.setattr(synthetic, "cache_folder", lambda name: folder / "cache" / name)
        threads = torch.get_num_threads()
        assert main(["video", "fit", "--name", "whole", "--runs", str(folder / "runs"), *TINY]) == 0
        yield folder
        torch.set_num_threads(threads)


def clips_of(place):
    return place / "cache" / "moving-digits-48-24-v1"


def test_a_run_leaves_everything_in_its_folder(place):
    run = place / "runs" / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"val/acc1", "val/acc5", "val/loss", "train_seconds", "parameters", "baseline_seconds"} <= set(metrics)
    assert metrics["configuration"] == "video_understanding" and metrics["mixer"] == "gla"
    assert metrics["baseline"] == "one frame" and 0 <= metrics["baseline/acc1"] <= 1
    assert metrics["train_clips"] == 48 and metrics["val_clips"] == 24 and metrics["unreadable"] == {}
    with Image.open(run / "report.png") as image:
        assert image.width > 1000
    rows = list(csv.DictReader((run / "logs" / "version_0" / "metrics.csv").open()))
    assert any(row["train/loss"] for row in rows) and any(row["val/acc1"] for row in rows)


def test_killed_in_the_middle_of_an_epoch_and_resumed(place):
    """Final weights equal the uninterrupted run's, bit for bit."""
    runs = place / "runs"
    code = f"""
import os, pathlib
from omnimix.recipes.common import synthetic
from omnimix.recipes.video import recipe as video
synthetic.cache_folder = lambda name: pathlib.Path({str(place / "cache")!r}) / name
step = video.VideoUnderstanding.training_step
def dying(self, batch, index):
    if self.global_step == 9:
        os.kill(os.getpid(), 9)
    return step(self, batch, index)
video.VideoUnderstanding.training_step = dying
video.fit(["--name", "killed", "--runs", {str(runs)!r}, *{TINY!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = torch.load(runs / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 8 and state["model"]["head"]["classes"] == 11
    assert main(["video", "fit", "--name", "killed", "--runs", str(runs), "--resume", *NO_BASELINE]) == 0
    first, second = (load_file(runs / name / "model.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and first
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert "baseline" not in json.loads((runs / "killed" / "metrics.json").read_text())


def test_validate_repeats_the_numbers_and_test_takes_several_views(place, capsys):
    run = place / "runs" / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    said = {}
    for words in (["validate"], ["test"], ["test", "--data.views=3", "--data.crops=2"]):
        capsys.readouterr()
        assert main(["video", words[0], "--run", str(run), "--json", "-", *words[1:]]) == 0
        [said[len(words)]] = json.loads(capsys.readouterr().out)
    assert said[1].get("val/loss", said[1].get("test/loss")) == pytest.approx(metrics["val/loss"], abs=1e-5)
    assert said[3]["test/loss"] == pytest.approx(metrics["val/loss"], abs=0.05)


def test_views_are_other_times_and_squares(place):
    clip = ClipConfig(size=24, channels=1, frames=4, sampling="dense", rate=8.0, crop=0.75)
    data = VideoFolderData(root=str(clips_of(place)), clip=clip, loading=VideoOptions(views=3, crops=2))
    sets(data)
    video = data.test_set[0, 0]["video"]
    assert video.shape == (6, 1, 4, 24, 24) and data.val_set[0, 0]["video"].shape == (1, 4, 24, 24)
    first, middle, last = video[::2]
    # These frames are square: there is no longer side. A window is half of a second: the first and last are its halves.
    assert torch.equal(video[::2], video[1::2])
    assert torch.equal(middle, data.val_set[0, 0]["video"]) and torch.equal(first[:, 2:], middle[:, :2])
    assert torch.equal(last[:, :2], middle[:, 2:]) and data.preprocess.seconds == 0.5


def test_several_views_are_averaged():
    backbone = BackboneConfig(dim=16, depth=1, scan="bidirectional")
    module = VideoUnderstanding(backbone=backbone, clips=(1, 4, 16, 16, 3)).eval()
    views = torch.randn(2, 5, 1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(module(views), torch.stack([module(views[:, i]) for i in range(5)]).mean(0))


def test_predict_names_class_and_probability(place, tmp_path, capsys):
    run = place / "runs" / "whole"
    clip = sorted((clips_of(place) / "val" / "up").iterdir())[0]
    (tmp_path / "more").mkdir()
    shutil.copy(clip, tmp_path / "more" / "a.mp4")
    (tmp_path / "more" / "b.mp4").write_bytes(clip.read_bytes()[:600])
    words = ["video", "predict", "--run", str(run), str(clip), str(tmp_path / "more")]
    capsys.readouterr()
    assert main([*words, "--top", "3", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    good = [row for row in rows if row["class"] is not None]
    assert [row["rank"] for row in good] == [1, 2, 3, 1, 2, 3] and {row["class"] for row in good} <= set(MOTIONS)
    assert [row["file"] for row in rows if row["class"] is None] == [str(tmp_path / "more" / "b.mp4")]
    model = omnimix.modalities.load_model(run)
    prepare = VideoPreprocess.from_dict(omnimix.modalities.read_details(run)["preprocess"])
    with torch.no_grad():
        best = model(prepare.load(clip)[None]).argmax()
    assert good[0]["class"] == prepare.classes[int(best)]
    assert main([*words, "--policy", "raise"]) == 2 and "b.mp4" in capsys.readouterr().err
    assert main(["video", "predict", "--run", str(run), str(tmp_path / "none.mp4")]) == 2
    assert main(["video", "predict", "--run", str(run), str(clip), "--picture", str(tmp_path / "new" / "p.png")]) == 0
    assert (tmp_path / "new" / "p.png").stat().st_size > 10_000
    assert main([*words, "--timeline", "--top=0"]) == 2
    assert "top is 0; it must be at least 1" in capsys.readouterr().err


def test_only_classifiers_of_clips_predict(tmp_path):
    from omnimix.recipes.video.predict import Predictor

    model = omnimix.create_model("vit_tiny_gla_patch16_224", dim=16, depth=1, classes=2, size=16)
    omnimix.modalities.save_model(model, tmp_path)
    with pytest.raises(CheckpointError, match="not a video classifier"):
        Predictor(tmp_path)


class Brightest(VideoClassifier):
    """Stands in for a trained model: the class is the brightness of what it sees, 0, 1 or 2."""

    def __init__(self, causal):
        torch.nn.Module.__init__(self)
        self.tokenizer = torch.nn.Identity()
        self.tokenizer.config = type("Config", (), {"causal": causal, "step": 2})
        self.longest = 0

    def forward(self, clips):
        self.longest = max(self.longest, clips.shape[2])
        return self._logits(clips.mean((1, 2, 3, 4)))

    def stream(self, chunk, state):
        self.longest = max(self.longest, chunk.shape[2])
        steps = chunk.unflatten(2, (-1, 2)).mean((1, 3, 4, 5))
        return type("Step", (), {"now": self._logits(steps), "state": None})

    def _logits(self, brightness):
        return -100 * (brightness[..., None] - torch.tensor([0.1, 0.5, 0.9])).square()


PREPARE = VideoPreprocess(
    classes=("dark", "grey", "bright"),
    **vars(ClipConfig(size=16, channels=1, frames=8, crop=1.0)),
    mean=(0.0,),
    std=(1.0,),
    seconds=1.0,
)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seconds", [(3, 2, 4), (1,), (0.2,)])
def test_a_timeline_finds_the_scenes(tmp_path, causal, seconds):
    shades = [torch.full((round(s * 20), 3, 16, 24), v) for s, v in zip(seconds, (25, 128, 230), strict=False)]
    write_video(tmp_path / "film.mp4", torch.cat(shades).to(torch.uint8), rate=20)
    model = Brightest(causal)
    with VideoReader(tmp_path / "film.mp4") as video:
        moments = list(Timeline(model, PREPARE).moments(video))
    assert moments[0].start == 0 and moments[-1].stop == pytest.approx(sum(seconds), abs=0.06)
    assert all(a.stop == b.start for a, b in pairwise(moments))
    assert model.longest <= 8
    found = list(scenes(moments))
    assert [scene.label for scene in found] == list(range(len(seconds)))
    assert sum(scene.moments for scene in found) == len(moments)
    for scene, end in zip(found[:-1], torch.tensor(seconds).cumsum(0).tolist(), strict=False):
        assert scene.stop == pytest.approx(end, abs=0.26)


def centre_of(frames):
    """Of brightness, on the ring that each axis of a frame is, as a part of its side: (t, 2), x before y."""
    light = frames.float().mean(1) - frames.float().mean(1).amin((1, 2), keepdim=True)
    turns = torch.exp(2j * torch.pi * (torch.arange(light.shape[-1]) + 0.5) / light.shape[-1])
    return torch.stack([(light * turns).sum((1, 2)).angle(), (light * turns[:, None]).sum((1, 2)).angle()], 1) / 6.2832


@pytest.mark.parametrize(
    ("motion", "way"), [("right", (1, 0)), ("up-right", (1, -1)), ("down", (0, 1)), ("left", (-1, 0))]
)
def test_digits_move_where_their_class_says(motion, way):
    generator = torch.Generator().manual_seed(1)
    times = torch.tensor([-0.1, 0.1])
    frames = render(torch.ones(8, 8), draw_way(motion, 1.0, generator), times, 64, generator)
    first, second = centre_of(frames)
    moved = torch.remainder(second - first + 0.5, 1) - 0.5
    assert moved.sign().mul(moved.abs() > 0.02).tolist() == list(way)


def test_digits_turn_either_way():
    bar = torch.zeros(8, 8)
    bar[0:4, 3:5] = 1.0
    generator = torch.Generator().manual_seed(0)
    spins = [draw_way("rotate", 1.0, generator).spin for _ in range(20)]
    assert min(spins) < -1.5 and max(spins) > 1.5 and min(map(abs, spins)) > 1.5
    still = {"centre": (0.5, 0.5), "velocity": (0.0, 0.0), "size": 0.7, "growth": 0.0}
    frames = render(bar, Way(**still, angle=0.0, spin=4.0), torch.tensor([0.0, 0.25]), 64, generator)
    # The hand of a clock points up, and then, a radian later, to the right.
    first, second = (light.argmax() for light in frames.float().mean(1).flatten(1))
    assert first // 64 < 30 and abs(first % 64 - 32) < 6 and second % 64 > 36


def test_one_moment_tells_nothing_of_the_class():
    """At the middle of a clip, place, size and angle are drawn alike for all classes."""
    generator = torch.Generator().manual_seed(0)
    for motion in MOTIONS:
        ways = [draw_way(motion, 1.0, generator) for _ in range(80)]
        size = torch.tensor([way.size for way in ways]).log()
        x, angle = torch.tensor([way.centre[0] for way in ways]), torch.tensor([way.angle for way in ways])
        assert size.mean() == pytest.approx(-0.714, abs=0.04) and x.mean() == pytest.approx(0.5, abs=0.13)
        assert angle.mean() == pytest.approx(torch.pi, abs=0.8)


def test_generated_clips_are_ordinary_files(place):
    root = clips_of(place)
    starts, rates = set(), set()
    for file in sorted((root / "train").rglob("*.mp4")):
        with VideoReader(file) as video:
            assert video.info.size == (32, 32) and video.info.duration == pytest.approx(1.0, abs=0.08)
            times = [time for time, _ in video.stream()]
            starts.add(round(video.info.start, 2))
            rates.add(len({round(b - a, 3) for a, b in pairwise(times)}) > 2)
        assert len(times) == moving_digits.FRAMES
    assert starts == {0.0, 1.5} and rates == {False, True}
    assert sorted(p.name for p in (root / "val").iterdir()) == sorted(MOTIONS)
    assert not [p for p in root.parent.iterdir() if p.name.startswith(".") and p.is_dir()]


def sets(data):
    data.prepare_data()
    data.setup("fit")
    return data.train_set, data.val_set


def test_tables_and_shards_give_what_folders_give(place, tmp_path):
    root = clips_of(place)
    (tmp_path / "table").mkdir()
    for split in ("train", "val"):
        files = sorted((root / split).rglob("*.mp4"))
        lines = [f"{file},{file.parent.name}" for file in files]
        (tmp_path / "table" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    words = [str(root), str(tmp_path / "shards"), "--kind", "video", "--samples", "20", "--keep-order"]
    assert main(["data", "shard", *words]) == 0
    clip = ClipConfig(size=24, channels=3, frames=4, sampling="segments")
    data = [
        VideoFolderData(root=str(where), clip=clip, augment=Augment(), loading=VideoOptions(seed=5))
        for where in (root, tmp_path / "table", tmp_path / "shards")
    ]
    assert len({d.preprocess for d in data}) == 1
    folders, tables, shards = (sets(d) for d in data)
    for other in (tables, shards):
        for one, same in zip(folders, other, strict=True):
            assert len(one) == len(same)
            for key in ((0, 3), (1, 3), (0, len(one) - 1)):
                assert torch.equal(one[key]["video"], same[key]["video"]) and one[key]["label"] == same[key]["label"]


def test_augmentation_is_alike_for_all_frames_and_follows_seed_and_epoch(place):
    options = {"train": 48, "val": 24, "augment": Augment(scale=0.3, colour=0.4)}
    (train, val), (other, _) = (sets(MovingDigitsData(loading=VideoOptions(seed=seed), **options)) for seed in (1, 2))
    video = train[0, 7]["video"]
    assert video.shape == (1, 16, 32, 32) and torch.equal(video, train[0, 7]["video"])
    assert not torch.equal(video, train[1, 7]["video"]) and not torch.equal(video, other[0, 7]["video"])
    assert torch.equal(val[0, 3]["video"], val[9, 3]["video"])
    still = torch.rand(3, 40, 50).expand(6, -1, -1, -1)
    cut = Augment(flip=False, colour=0.3)(still, 16, seed=4)
    assert cut.shape == (6, 3, 16, 16) and all(torch.equal(frame, cut[0]) for frame in cut)


def test_kept_clips_are_those_of_the_files(place):
    options = {"train": 48, "val": 24}
    (kept, _), (read, _) = (
        sets(MovingDigitsData(**options, loading=VideoOptions(keep=keep))) for keep in (None, False)
    )
    # The file's frames at a random place against the central ones: of 16 frames in 16 places the same.
    assert torch.allclose(kept[0, 4]["video"], MovingDigitsData(**options).preprocess.load(read.source.media(4)))
    first = kept.source.media(4)
    assert kept.source.media(4) is first and kept.source.name(4) == read.source.name(4)
    single = MovingDigitsData(**options)
    sets(single)
    frames = single.single_frames()
    assert frames.train_set[0, 4]["video"].shape == (1, 1, 32, 32)
    assert torch.equal(frames.val_set[0, 4]["video"][:, 0], single.val_set[0, 4]["video"][:, 8])


def test_squares_go_along_the_longer_side():
    wide = torch.zeros(1, 3, 20, 60, dtype=torch.uint8)
    wide[..., :20], wide[..., 40:] = 100, 200
    prepare = VideoPreprocess.from_dict({**PREPARE.to_dict(), "size": 20})
    shades = [float(square.mean() * 255) for square in prepare.squares(wide, 3)]
    assert shades == pytest.approx([100, 0, 200], abs=1.5)
    bottom = prepare.squares(wide.transpose(2, 3), 2)[1]
    assert bottom.shape == (1, 1, 20, 20) and float(bottom.mean() * 255) == pytest.approx(200, abs=1.5)
    assert strip(torch.zeros(7, 1, 4, 5), 3).shape == (1, 4, 17)


@pytest.mark.parametrize("policy", ["skip", "raise", "limit"])
def test_folders_with_broken_files(place, tmp_path, capsys, policy):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for motion in ("up", "down"):
            shutil.copytree(clips_of(place) / split / motion, root / split / motion)
    files = sorted((root / "train").rglob("*.mp4"))
    files[1].write_bytes(b"")
    files[5].write_bytes(files[5].read_bytes()[:1500])
    most = "0.01" if policy == "limit" else "0.5"
    typed = [
        *("video", "fit", "--name", "folder", "--runs", str(tmp_path / "runs"), "--config", "video_folder"),
        *(f"--data.root={root}", f"--data.policy={'raise' if policy == 'raise' else 'skip'}"),
        *(f"--data.max_unreadable={most}", "--data.batch_size=3", "--data.workers=0", "--threads=1"),
        *("--data.clip.size=16", "--data.clip.frames=4", "--data.clip.sampling=dense"),
        *("--model.dim=16", "--model.depth=1", "--model.causal=true", "--model.mixer=mamba2"),
        *("--model.tokens.tubelet=[2,8,8]", "--model.tokens.group=[2,1,1]", "--model.tokens.merge=2"),
        *("--trainer.max_epochs=1", "--model.one_frame_epochs=1"),
    ]
    code = main(typed)
    captured = capsys.readouterr()
    if policy != "skip":
        assert code == 2 and captured.err.count("omnimix: error: ") == 1
        assert ("max_unreadable" in captured.err) == (policy == "limit")
        return
    assert code == 0
    metrics = json.loads((tmp_path / "runs" / "folder" / "metrics.json").read_text())
    assert set(metrics["unreadable"]) == {str(files[1]), str(files[5])} and metrics["val_clips"] == 4
    # A causal model is streamed.
    assert main(["video", "predict", str(files[0]), "--timeline", "--run", str(tmp_path / "runs" / "folder")]) == 0
    assert " s  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--data.train=3", "data.train is 3"),
        ("--data.views=0", "data.views is 0"),
        ("--data.workers=2", "set workers to 0"),
        ("--data.clip.sampling=denze", "dense"),
        ("--model.mixer=glaa", "did you mean 'gla'?"),
        ("--data=VideoFolder", "did you mean 'VideoFolderData'"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    assert main(["video", "fit", typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())


def test_clip_options_are_checked():
    for wrong in ({"crop": 0.0}, {"rate": -1.0}, {"size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ClipConfig(**wrong)
    assert RATE == 16
