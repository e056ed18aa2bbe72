"""`omnimix text` from files to words; stopped and resumed on the way."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from omnimix.__main__ import main
from omnimix.backbones import BackboneConfig
from omnimix.backbones.decoding import DiffusionConfig, GenerationConfig
from omnimix.modalities.text.text_generator import TextGenerator
from omnimix.recipes.text import recipe
from omnimix.recipes.text.generate import unmasked

WORDS = "the cat sat on a mat and saw two dogs run to it".split()


@pytest.fixture(autouse=True)
def _one_thread():
    """Processes that must agree bit for bit share the order in which they add."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def corpus(folder):
    draws = torch.Generator().manual_seed(0)
    for i in range(40):
        picks = torch.randint(len(WORDS), (120,), generator=draws).tolist()
        (folder / f"{i}.txt").write_text(" ".join(WORDS[pick] for pick in picks))
    return folder


def typed(folder):
    """A small model, in which all that has a state of its own is on: accumulation, Muon, averaging, warm-up."""
    return [
        *("--data=TextFiles", f"--data.path={folder / 'texts'}", "--data.tokenizer=bytes", "--data.length=64"),
        *(f"--data.options.cache={folder / 'cache'}", "--data.options.val_fraction=0.2", "--data.batch_size=4"),
        *("--model.dim=16", "--model.depth=2", "--model.mixer=gla,attention", '--model.prompts=["the "]'),
        *("--model.training.optimizer=muon", "--model.training.lr=0.01", "--model.training.length_warmup=0.4"),
        *("--model.training.ema=0.9", "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=3"),
        *("--trainer.max_steps=20", "--trainer.val_check_interval=16", "--checkpoint_steps=4"),
        *("--data.options.val_tokens=600", "--trainer.precision=32-true"),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts and one finished run, "whole"."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts").mkdir()
    corpus(folder / "texts")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert fit(folder, "whole") == 0
    torch.set_num_threads(threads)
    return folder


def fit(folder, name, *more):
    return main(["text", "fit", "--name", name, "--runs", str(folder / "runs"), *typed(folder), *more])


def resume(folder, name):
    return main(["text", "fit", "--name", name, "--runs", str(folder / "runs"), "--resume"])


def numbers(folder, name):
    return json.loads((folder / "runs" / name / "metrics.json").read_text())


def history(folder, name):
    """What the run remembers of each step, without what depends on the clock."""
    state = torch.load(folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
    rows = state["callbacks"]["StepHistory"]["rows"]
    return [{key: row[key] for key in row if key not in ("seconds", "tokens_per_second")} for row in rows]


def assert_same_run(folder, name):
    first, second = (load_file(folder / "runs" / run / "model.safetensors") for run in ("whole", name))
    assert first.keys() == second.keys() and first
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    assert history(folder, "whole") == history(folder, name)
    samples = [(folder / "runs" / run / "samples.txt").read_text() for run in ("whole", name)]
    assert samples[0] == samples[1]
    one, other = numbers(folder, "whole"), numbers(folder, name)
    assert one["val/bits_per_byte"] == other["val/bits_per_byte"] and one["tokens"] == other["tokens"]


def test_a_run_leaves_everything_in_its_folder(place):
    run, metrics = place / "runs" / "whole", numbers(place, "whole")
    assert metrics["steps"] == 20 and metrics["objective"] == "causal" and metrics["mixer"] == "gla,attention"
    # Each byte is a token; the documents' ends are scored too.
    assert metrics["val_tokens"] > metrics["val_bytes"] > 2000
    assert metrics["tokens"] > 20 * 2 * 4 * 50 and metrics["tokens_per_second"] > 0
    assert {"tokenizer.json", "config.json", "samples.txt", "config.yaml"} <= {path.name for path in run.iterdir()}
    with Image.open(run / "report.png") as image:
        assert image.width > 1000
    rows = history(place, "whole")
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert list(losses) == [3, 6, 9, 12, 15, 18, 20] and losses[20] < losses[3] - 1
    validated = {row["step"]: row for row in rows if "val/bits_per_byte" in row}
    assert list(validated) == [8, 16] and validated[16]["val/bits_per_byte"] < validated[8]["val/bits_per_byte"] < 8
    assert validated[8]["val/perplexity"] == pytest.approx(torch.tensor(validated[8]["val/loss"]).exp().item(), 1e-4)
    samples = (run / "samples.txt").read_text()
    assert [f"step {step}, from 'the '" in samples for step in (8, 16, 20)] == [True] * 3
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 16 and best["model"]["objective"]["type"] == "causal"


def test_killed_in_the_middle_of_an_epoch_and_resumed(place):
    """Weights, curves and samples equal the uninterrupted run's, bit for bit."""
    code = f"""
import os, sys, torch
torch.set_num_threads(1)
from omnimix.recipes.text import recipe as text
step = text.TextGeneration.training_step
def dying(self, batch, index):
    if self.global_step == 11:
        os.kill(os.getpid(), 9)
    return step(self, batch, index)
text.TextGeneration.training_step = dying
text.fit(["--name", "killed", "--runs", {str(place / "runs")!r}, *{typed(place)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Saved at step 8, after which it was validated: neither is done again nor left out.
    last = torch.load(place / "runs" / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    assert resume(place, "killed") == 0
    assert_same_run(place, "killed")


def test_ctrl_c_saves_and_says_how_to_go_on(place, capsys, monkeypatch):
    step = recipe.TextGeneration.training_step

    def interrupted(self, batch, index):
        # The first of the two batches of a step: the other one is still taken.
        if self.global_step == 13 and not self._window:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.TextGeneration, "training_step", interrupted)
        assert fit(place, "stopped") == 130
    said = capsys.readouterr().out
    assert "stopped after step 14" in said
    assert f"omnimix text fit --name stopped --runs {place / 'runs'} --resume" in said
    assert resume(place, "stopped") == 0
    assert_same_run(place, "stopped")


def test_validate_repeats_the_number(place, capsys):
    run = str(place / "runs" / "whole")
    capsys.readouterr()
    assert main(["text", "validate", "--run", run, "--json", "-"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["val/bits_per_byte"] == pytest.approx(numbers(place, "whole")["val/bits_per_byte"], abs=1e-6)
    assert row["val/perplexity"] == pytest.approx(numbers(place, "whole")["val/perplexity"], abs=1e-5)


def test_a_diffusion_model_is_measured_by_the_same_masks(place, capsys):
    objective = ["--model.objective=masked", "--trainer.max_steps=8", "--model.training.optimizer=adamw"]
    assert fit(place, "masked", *objective) == 0
    assert numbers(place, "masked")["val/bits_per_byte"] < 8
    run = str(place / "runs" / "masked")
    capsys.readouterr()
    assert main(["text", "validate", "--run", run, "--json", "-", "--seed_everything=5"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["val/bits_per_byte"] == pytest.approx(numbers(place, "masked")["val/bits_per_byte"], abs=1e-6)
    state = torch.get_rng_state()
    module = recipe.TextGeneration(backbone=BackboneConfig(dim=16, depth=1, pattern=("attention",)), objective="masked")
    assert module.model.config.backbone.scan == "bidirectional"
    torch.set_rng_state(state)
    module.validation_step({"tokens": torch.randint(257, (2, 8)), "bytes": 3}, 0)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randint(257, (2, 8))
    assert torch.equal(after, torch.get_rng_state())
    words = ["text", "generate", "--run", run, "--max_new_tokens", "12", "--steps", "3", "--block", "6", "the "]
    assert main(words) == 0 and capsys.readouterr().out.endswith("\n")
    writer, shown = TextGenerator.load(run), io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    text = unmasked(writer, "the ", DiffusionConfig(max_new_tokens=12, steps=3, block=6), [], 0, terminal)
    assert "░" in shown.getvalue() and "the " in shown.getvalue() and "░" not in text
    assert main([*words, "--top_k", "3"]) == 2
    assert "--top_k does not apply: a model with objective 'masked' is decoded by diffusion" in capsys.readouterr().err


def generated(capsys, run, *words):
    capsys.readouterr()
    code = main(["text", "generate", "--run", str(run), "--max_new_tokens", "24", *words])
    assert code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_generate_goes_on_with_prompts_and_standard_input(place, capsys, monkeypatch):
    run = place / "runs" / "whole"
    whole = generated(capsys, run, "the cat ")
    assert len(whole) > 5 and whole == generated(capsys, run, "the cat ")
    assert generated(capsys, run, "--echo", "the cat ") == "the cat " + whole
    assert generated(capsys, run, "--seed", "1", "the cat ") != whole
    for words in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat "))
        assert generated(capsys, run, *words) == whole
    both = json.loads(generated(capsys, run, "--json", "-", "the cat ", "a dog"))
    assert [row["prompt"] for row in both] == ["the cat ", "a dog"] and both[0]["text"] + "\n" == whole
    stop = whole[3]
    assert generated(capsys, run, "--stop", stop, "the cat ") == whole[: whole.index(stop)] + "\n"
    assert generated(capsys, run, "--top_k", "1", "--temperature", "5", "a ") == generated(
        capsys, run, "--temperature", "0", "a "
    )


def test_generate_searches_by_beams(place, capsys):
    run = place / "runs" / "whole"
    found = generated(capsys, run, "--num_beams", "3", "the cat ")
    [row] = json.loads(generated(capsys, run, "--num_beams", "3", "--json", "-", "the cat "))
    assert found == row["text"] + "\n"

    writer = TextGenerator.load(run)
    ways = [GenerationConfig(max_new_tokens=24, num_beams=n) for n in (1, 3)]
    greedy, best = (writer.generate(["the cat "], way)[0] for way in ways)
    assert best.text == row["text"]
    assert generated(capsys, run, "--num_beams", "1", "--temperature", "0", "the cat ") == greedy.text + "\n"
    assert main(["text", "generate", "--run", str(run), "--num_beams", "3", "--temperature", "1", "a"]) == 2
    assert "does not sample" in capsys.readouterr().err


def test_a_long_prompt_is_read_once(place, tmp_path, capsys):
    run, file = place / "runs" / "whole", tmp_path / "long.safetensors"
    whole = generated(capsys, run, "the cat sat on ")
    assert generated(capsys, run, "--prefix", str(file), "the cat sat on ") == whole
    assert file.is_file()
    assert generated(capsys, run, "--prefix", str(file), "") == whole
    assert main(["text", "generate", "--run", str(run), "--prefix", str(tmp_path / "no"), "a", "b"]) == 2
    assert "its text is to be the only prompt" in capsys.readouterr().err


def test_ctrl_c_ends_a_text_where_it_is(place, capsys, monkeypatch):
    def stream(self, *arguments, **options):
        yield "the mat"
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "stream", stream)
    capsys.readouterr()
    assert main(["text", "generate", "--run", str(place / "runs" / "whole"), "on "]) == 130
    captured = capsys.readouterr()
    assert captured.out == "the mat\n" and captured.err == ""


def test_generate_needs_a_tokenizer_and_a_model(place, tmp_path, capsys):
    for name in ("model.safetensors", "config.json", "config.yaml"):
        (tmp_path / name).write_bytes((place / "runs" / "whole" / name).read_bytes())
    assert main(["text", "generate", "--run", str(tmp_path), "a"]) == 2
    assert "there is no tokenizer" in capsys.readouterr().err
    assert main(["text", "generate", "--run", str(tmp_path / "nowhere"), "a"]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["text", "generate", "--run", str(place / "runs" / "whole"), "--device", "abacus", "a"]) == 2
    assert "device is 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--model.mixer=glaa", "unknown mixer 'glaa'; did you mean 'gla'?"),
        ("--model.objective=casual", "unknown objective 'casual'; did you mean 'causal'?"),
        ("--model.objective.n_futrue=2", "did you mean 'n_future'"),
        ("--model.objective.n_future=0", "CausalConfig.n_future is 0"),
        (
            "--model.objective.complementary=true",
            "objective 'causal' has no option 'complementary'; 'complementary' is one of 'masked'",
        ),
        ("--model.scan=both", "configure scan='forward'"),
        ("--model.training.optimizer=moun", "moun"),
        ("--model.training.decay=2", "training.decay is 2.0"),
        ("--model.training.length_warmup=2", "training.length_warmup is 2.0"),
        ("--data=TextFile", "did you mean 'TextFiles'"),
        ("--trainer.max_steps=-1", "the learning rate's schedule needs an end"),
    ],
)
def test_mistakes_are_one_line(place, capsys, wrong, said):
    assert fit(place, "wrong", wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1
    assert said in error


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_accumulated_batches_weigh_by_their_tokens():
    module = recipe.TextGeneration(backbone=BackboneConfig(dim=16, depth=1))
    tokens = torch.randint(257, (3, 21))
    whole = module.model.loss(tokens, lengths=torch.tensor([21, 4, 9]))
    whole.loss.backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()

    class Trainer:
        accumulate_grad_batches, world_size = 4, 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "trainer", Trainer)
        for row, length in zip(tokens, (21, 4, 9), strict=True):
            module.on_train_batch_start(None, 0)
            loss = module.training_step({"tokens": row[None, :length], "bytes": 1}, 0)["loss"]
            # As Lightning does, though the epoch may end before there are four.
            (loss / 4).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    for p, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
