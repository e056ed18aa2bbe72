"""Options by the names that transformers has; the old ones work for one release, with a warning."""

import warnings

import pytest
import yaml

from omnimix.backbones import BackboneConfig, BlockConfig, LanguageModelConfig
from omnimix.backbones.decoding import DiffusionConfig, GenerationConfig, SpeculationConfig
from omnimix.backbones.heads.causal import CausalConfig
from omnimix.backbones.serialization import from_dict, to_dict
from omnimix.errors import ConfigError
from omnimix.recipes import CONFIGS
from omnimix.recipes.common.arguments import prepared
from omnimix.recipes.common.migration import migrate
from omnimix.recipes.common.trees import DataTrees, Trees
from omnimix.recipes.text.base import TextOptions
from omnimix.recipes.text.data import TextData, TextFiles
from omnimix.recipes.text.generate import _parser
from omnimix.recipes.text.recipe import TextGeneration
from omnimix.utils.options import underscored
from omnimix.utils.renamed import renamed_arguments

OLD = [
    (GenerationConfig, "max_tokens", "max_new_tokens"),
    (GenerationConfig, "beams", "num_beams"),
    (DiffusionConfig, "length", "max_new_tokens"),
    (SpeculationConfig, "ahead", "num_assistant_tokens"),
    (CausalConfig, "ahead", "n_future"),
    (CausalConfig, "ahead_weight", "n_future_weight"),
    (TextOptions, "vocabulary", "vocab_size"),
]


@pytest.mark.parametrize(("cls", "old", "new"), OLD)
def test_old_names_of_configurations_work_and_warn(cls, old, new):
    with pytest.warns(FutureWarning, match=f"{cls.__name__}.{old} is now {new}"):
        config = cls(**{old: 3})
    assert config == cls(**{new: 3})
    with pytest.warns(FutureWarning, match=new):
        assert getattr(config, old) == 3
    with pytest.raises(ConfigError, match=f"{old} is the old name of {new}"):
        cls(**{old: 3, new: 3})


@pytest.mark.parametrize(("cls", "old", "new"), OLD)
def test_what_was_stored_is_read_in_silence(cls, old, new):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = to_dict(cls(**{new: 3}))
        assert old not in stored
        stored[old] = stored.pop(new)
        assert from_dict(cls, stored) == cls(**{new: 3})


def test_flags_of_generate():
    parser = _parser()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = parser.parse_args(
            underscored("--run r --max-new-tokens 5 --num_beams=2 --top-k 3 --no_echo x-y".split())
        )
    assert (found.max_new_tokens, found.num_beams, found.top_k, found.prompts) == (5, 2, 3, ["x-y"])
    assert found.echo is False and parser.parse_args(["--run", "r"]).max_new_tokens == 256
    with pytest.warns(FutureWarning, match="--max_tokens is now --max_new_tokens"):
        assert parser.parse_args(["--run", "r", "--max_tokens", "5"]).max_new_tokens == 5
    with pytest.warns(FutureWarning, match="--beams is now --num_beams"):
        assert parser.parse_args(["--run", "r", "--beams", "5"]).num_beams == 5
    assert "--max_tokens" not in parser.format_help() and "--beams" not in parser.format_help()


def test_flags_and_files_of_recipes():
    trees = Trees(TextGeneration)
    with pytest.warns(FutureWarning, match="--model.objective.ahead is now --model.objective.n_future"):
        trees.flag("--model.objective.ahead", ["objective", "ahead"], "2")
    assert trees.checked()["objective"]["n_future"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = yaml.safe_load("model: {objective: {type: causal, ahead: 3, ahead_weight: 0.5}}")
        trees.take(migrate(stored))
    assert trees.checked()["objective"] == to_dict(CausalConfig(n_future=3, n_future_weight=0.5))


def test_language_models():
    backbone = BackboneConfig(dim=8, depth=1)
    with pytest.warns(FutureWarning, match="LanguageModelConfig.(vocabulary|tie) is now (vocab_size|tie_word_emb)"):
        config = LanguageModelConfig(backbone=backbone, vocabulary=7, tie=False)
    assert (config.vocab_size, config.tie_word_embeddings) == (7, False)
    stored = to_dict(config)
    stored["vocabulary"], stored["tie"] = stored.pop("vocab_size"), stored.pop("tie_word_embeddings")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_dict(LanguageModelConfig, stored) == config


def test_arguments_of_the_text_recipe():
    with pytest.warns(FutureWarning, match="tie.* is now tie_word_embeddings"):
        module = TextGeneration(backbone=BackboneConfig(dim=8, depth=1, pattern=("gla",)), tie=False)
    assert not module.model.config.tie_word_embeddings
    with pytest.warns(FutureWarning, match="--model.tie is now --model.tie_word_embeddings"):
        argv, _, _ = prepared(
            ["--model.tie=false", "--model.dim", "8"], CONFIGS / "text_generation.yaml", TextGeneration, TextData
        )
    assert "--model.tie_word_embeddings=false" in argv
    assert migrate({"model": {"tie": False, "vocabulary": 9}})["model"] == {
        "tie_word_embeddings": False,
        "vocab_size": 9,
    }


def test_hyphens_and_underscores():
    typed = ["--data.batch-size=3", "--trainer.max-epochs", "a-b", "--no_peers", "-c", "x-y", "--", "--a-b"]
    wanted = ["--data.batch_size=3", "--trainer.max_epochs", "a-b", "--no-peers", "-c", "x-y", "--", "--a-b"]
    assert underscored(typed) == wanted
    assert underscored(["--json=a-b", "--keep-order"]) == ["--json=a-b", "--keep_order"]


@pytest.mark.parametrize("command", ["vision fit", "data shard", "text generate", "kernels check", "bench decode"])
def test_every_command_takes_hyphens(command, capsys):
    from omnimix.__main__ import main

    def error(word: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), word, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    flags = {
        "vision fit": "--trainer.max-epochs=1",
        "data shard": "--keep-order",
        "text generate": "--max-new-tokens=1",
        "kernels check": "--he",
        "bench decode": "--no-peers",
    }
    assert error(flags[command]).startswith("usage")


def test_options_of_data_sets():
    trees = DataTrees(TextFiles)
    with pytest.warns(FutureWarning, match=r"--data.borders is now --data.boundaries"):
        trees.flag("--data.borders", trees.path("--data.borders"), "padded")
    assert trees.checked()["options"]["boundaries"] == "padded"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trees = DataTrees(TextFiles)
        trees.take({"data": {"class_path": "TextFiles", "init_args": {"options": {"borders": "padded"}}}})
    assert trees.checked()["options"]["boundaries"] == "padded"


@pytest.mark.parametrize("cls", [BlockConfig, BackboneConfig])
def test_the_old_name_of_a_scan_works_and_warns(cls):
    given = {"mixer": "gla"} if cls is BlockConfig else {"dim": 8, "depth": 1}
    new = cls(**given, scan="bidirectional")
    with pytest.warns(FutureWarning, match="scan='both' is now scan='bidirectional'") as record:
        assert cls(**given, scan="both") == new
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_dict(cls, to_dict(new) | {"scan": "both"}) == new


def test_old_names_of_arguments_work_and_warn():
    @renamed_arguments(number="sample_id")
    def function(*, sample_id=0):
        return sample_id

    assert function(sample_id=1) == 1
    with pytest.warns(FutureWarning, match=r"function\(number=\) is now sample_id") as record:
        assert function(number=2) == 2
    assert record[0].filename == __file__
    with pytest.raises(ConfigError, match="give one of them"):
        function(number=2, sample_id=2)
