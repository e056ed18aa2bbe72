"""Configuration trees from flags and files: short forms, parts by their type, and errors in one line."""

import shlex

import pytest
import yaml

from omnimix.__main__ import main
from omnimix.backbones import BackboneConfig, list_ffns, list_mixers
from omnimix.backbones.ffn import get_ffn
from omnimix.recipes.common.trees import Trees, part_name
from omnimix.recipes.text.recipe import TextGeneration
from omnimix.recipes.vision.recipe import VisionClassification

SHORTEST = (
    "--threads 1 --model.dim 16 --model.depth 2 --trainer.max_epochs 1 --trainer.limit_train_batches 2 "
    "--trainer.limit_val_batches 1 --trainer.accelerator cpu"
)


def shown(capsys, typed: str, kind: str = "vision") -> dict:
    """The configuration of the model that a command line stands for."""
    with pytest.raises(SystemExit) as stop:
        main([kind, "fit", *shlex.split(typed), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]


@pytest.mark.parametrize(
    ("typed", "field", "held"),
    [
        ("--model.ffn moe", "ffn", {"type": "moe", "experts": 8}),
        ("--model.ffn.experts 16 --model.ffn moe", "ffn", {"type": "moe", "experts": 16}),
        ("--model.ffn moe --model.ffn.experts 16", "ffn", {"type": "moe", "experts": 16, "active": 2}),
        ("--model.ffn=moe --model.ffn.experts=16 --model.backbone.ffn.active 4", "ffn", {"experts": 16, "active": 4}),
        ("--model.ffn MoEConfig", "ffn", {"type": "moe"}),
        ("--model.ffn '{type: moe, experts: 3}'", "ffn", {"type": "moe", "experts": 3}),
        ("--model.ffn.ratio 3", "ffn", {"type": "swiglu", "ratio": 3.0}),
        ("--model.ffn none", "ffn", None),
        ("--model.ffn null", "ffn", None),
        ("--model.mixers.gla.heads 2", "mixers", {"gla": {"type": "gla", "heads": 2}}),
        ("--model.mixer gla,attention+mamba2", "pattern", ["gla", "attention+mamba2"]),
        ("--model.backbone.pattern '[gla, attention]'", "pattern", ["gla", "attention"]),
        ("--model.backbone.residual sandwich", "residual", {"type": "sandwich", "layer_scale": None}),
        ("--model.backbone.residual.layer_scale 1e-4", "residual", {"type": "pre", "layer_scale": 1e-4}),
        ("--model.scan cross --model.scan null", "scan", "bidirectional"),
    ],
)
def test_flags_set_what_they_name(capsys, typed, field, held):
    found = shown(capsys, typed)["backbone"][field]
    if not isinstance(held, dict):
        assert found == held
        return
    for name, value in held.items():
        if isinstance(value, dict):
            assert found[name] == found[name] | value
        else:
            assert found[name] == value


def test_a_pattern_holds_blocks_with_options_of_their_own(capsys):
    pattern = (
        "[gla, {mixer: {type: attention, heads: 2}, ffn: none}, {mixer: MambaConfig, ffn: {type: moe, experts: 3}}]"
    )
    first, second, third = shown(capsys, f"--model.depth 3 --model.backbone.pattern '{pattern}'")["backbone"]["pattern"]
    assert first == "gla"
    assert second["mixer"]["type"] == "attention" and second["mixer"]["heads"] == 2 and second["ffn"] is None
    assert third["mixer"] == "mamba" and third["ffn"]["experts"] == 3


@pytest.mark.parametrize(
    "said",
    [
        {"ffn": {"type": "moe", "experts": 16}, "mixers": {"gla": {"heads": 2}}},
        {"ffn": {"type": "MoEConfig", "experts": 16}, "mixers": {"gla": {"type": "gla", "heads": 2}}},
        {
            "ffn": {"class_path": "omnimix.backbones.ffn.moe.MoEConfig", "init_args": {"experts": 16}},
            "mixers": {"gla": {"class_path": "GLAConfig", "init_args": {"heads": 2}}},
        },
        {"backbone": {"ffn": {"type": "moe", "experts": 16}, "mixers": {"gla": {"heads": 2}}}},
    ],
)
def test_files_name_parts_by_type_or_class_and_flags_change_them(tmp_path, capsys, said):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"model": said | {"dim": 32}}))
    found = shown(capsys, f"--config {file} --model.ffn.active 3")["backbone"]
    assert found["dim"] == 32 and found["depth"] == 4 and found["mixers"]["gla"]["heads"] == 2
    assert found["ffn"] == found["ffn"] | {"type": "moe", "experts": 16, "active": 3}
    # Another type keeps nothing of the one before.
    assert shown(capsys, f"--config {file} --model.ffn mlp")["backbone"]["ffn"] == {"type": "mlp", "ratio": 4.0}


def test_options_of_objectives_are_trees_too(capsys):
    found = shown(capsys, "--model.objective masked --model.objective.eps 1e-2", "text")
    assert found["objective"] == found["objective"] | {"type": "masked", "eps": 0.01}


def test_every_part_is_known_by_its_name_and_by_its_class():
    for name in list_ffns():
        assert part_name(name) == part_name(get_ffn(name).config.__name__) == name
    trees = Trees(TextGeneration)
    for name in list_mixers():
        trees.merge(["backbone", "pattern"], name)
        assert trees.checked()["backbone"]["pattern"] == [name]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "--model.ffn.experts 16",
            "ffn 'swiglu' has no option 'experts'; 'experts' is one of 'moe': add --model.ffn moe",
        ),
        ("--model.ffn none --model.ffn.experts 4", "there is no feed-forward layer; 'experts' is one of 'moe': add"),
        ("--model.ffn moe --model.ffn.exprts 16", "MoEConfig has no field 'exprts'; did you mean 'experts'?"),
        ("--model.ffn moe --model.ffn.experts many", "MoEConfig.experts is 'many'; it must be an integer"),
        ("--model.ffn moe --model.ffn.router sigmod", "(did you mean 'sigmoid'?)"),
        ("--model.ffn moe --model.ffn.experts 0", "MoEConfig.experts is 0; it must be greater than 0"),
        ("--model.ffn mop", "unknown feed-forward layer 'mop'; did you mean 'moe'"),
        ("--model.mixers.gla.haeds 3", "GLAConfig has no field 'haeds'; did you mean 'heads'?"),
        ("--model.mixers.gla.heads 2.5", "GLAConfig.heads is 2.5; it must be an integer or null"),
        ("--model.mixers.glaa.heads 2", "unknown mixer 'glaa'; did you mean 'gla'?"),
        ("--model.mixers.mamba.expand 3", "mixers has options for 'mamba', which the pattern does not name (gla)"),
        ("--model.mixers.gla '{type: mamba}'", "type is 'mamba', and these are the options of 'gla'"),
        ("--model.backbone.dpth 3", "BackboneConfig has no field 'dpth'; did you mean 'depth'?"),
        ("--model.backbone.residual sandwhich", "did you mean 'sandwich'?"),
        ("--model.backbone.pattern '[{mixr: gla}]'", "BlockConfig has no field 'mixr'; did you mean 'mixer'?"),
        ("--model.backbone '[1]'", "BackboneConfig must be a mapping of its fields"),
        ("--model.backbone '{type: x}'", "type is 'x', and these are the options of 'BackboneConfig'"),
        ("--model.mixer GLAA", "unknown mixer 'GLAA'; did you mean 'gla'"),
        ("--model.dim big", "BackboneConfig.dim is 'big'; it must be an integer"),
        ("--model.backbone.norm 3", "BackboneConfig.norm is 3; it must be true or false"),
        ("--model.pattern gla", "did you mean"),
        ("--model.ffn '{type: moe'", "--model.ffn: cannot read '{type: moe'"),
        ("--model.mixer attention --model.scan hilbert", "scan is 'hilbert', and no mixer that it is for"),
        ("--model.mixer", "--model.mixer needs a value"),
        ("--model.training.lr x", "--model.training.lr is 'x'; it must be a number"),
        ("--model.objective.eps 1", "unrecognized arguments: --model.objective.eps"),
    ],
)
def test_mistakes_are_one_line_of_ours(tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    assert main(["vision", "fit", *shlex.split(typed)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnimix: error: ") and error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_file_whose_model_is_no_mapping_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_text("model: [1, 2]")
    assert main(["vision", "fit", "--config", "f.yaml"]) == 2
    assert "model is [1, 2]; it must be a mapping" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_with_a_tree_trains_and_is_resumed_with_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree = (
        "--model.ffn moe --model.ffn.experts 16 --model.mixers.gla.heads 2 --model.backbone.residual sandwich "
        "--model.backbone.stages '[{dim: 16, depth: 1}, {dim: 24, depth: 1, transition: merge}]'"
    )
    assert main(["vision", "fit", *shlex.split(f"{SHORTEST} {tree}")]) == 0
    stored = yaml.safe_load((tmp_path / "runs/vision/config.yaml").read_text())["model"]["backbone"]
    assert stored["ffn"]["type"] == "moe" and stored["ffn"]["experts"] == 16 and stored["mixers"]["gla"]["heads"] == 2
    assert stored["residual"]["type"] == "sandwich" and stored["stages"][1]["transition"]["type"] == "merge"
    assert main(["vision", "validate", "--run", "runs/vision"]) == 0
    assert main(["vision", "fit", "--resume", "--trainer.max_epochs", "2"]) == 0
    again = yaml.safe_load((tmp_path / "runs/vision/config.yaml").read_text())["model"]["backbone"]
    assert again == stored


def test_in_python_a_recipe_takes_the_configuration_itself():
    backbone = BackboneConfig(dim=16, depth=2, pattern=("gla",), scan="bidirectional", ffn="moe")
    module = VisionClassification(backbone=backbone, patch=4)
    assert module.model.config.backbone == backbone and module.mixer == "gla"


def test_a_recipe_s_own_scan_is_for_mixers_that_scan(capsys):
    assert shown(capsys, "", "video")["backbone"]["scan"] == "temporal-first"
    assert shown(capsys, "--model.mixer attention,gla", "video")["backbone"]["scan"] == "temporal-first"
    assert shown(capsys, "--model.mixer attention", "video")["backbone"]["scan"] == "forward"
    assert shown(capsys, "--model.mixer attention", "vision")["backbone"]["scan"] == "bidirectional"
