"""Configurations refuse values of a wrong type where they are made, as they do where they are read."""

import dataclasses
import pickle

import pytest

import omnimix as om
from omnimix.backbones import BackboneConfig, BlockConfig, StageConfig, from_dict
from omnimix.backbones.ffn.mlp import MLPConfig
from omnimix.backbones.mixers.gla import GLAConfig
from omnimix.backbones.registry import REGISTRIES
from omnimix.backbones.residual.norms import PostConfig
from omnimix.backbones.typed import Config
from omnimix.backbones.wrappers.fold import FoldConfig
from omnimix.backbones.wrappers.mixture_of_depths import MixtureOfDepthsConfig
from omnimix.backbones.wrappers.parallel import ParallelConfig
from omnimix.errors import ConfigError

pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "dim is '64'; it must be an integer"),
        ({"dim": 32.0}, "dim is 32.0; it must be an integer"),
        ({"depth": True}, "depth is True; it must be an integer"),
        ({"pattern": 3}, "pattern is 3; it must be a list, each entry a name or a BlockConfig"),
        ({"pattern": "gla"}, "pattern is 'gla'; it must be a list"),
        ({"pattern": ["gla", 3]}, r"pattern is \['gla', 3\]; it must be a list"),
        ({"pattern": (name for name in ["gla"])}, "pattern is <generator.*; it must be a list"),
        ({"mixers": None}, "mixers is None; it must be a mapping of names to the options of a mixer"),
        ({"mixers": ["gla"]}, r"mixers is \['gla'\]; it must be a mapping"),
        ({"scan": None}, "scan is None; it must be a name"),
        ({"drop_path": None}, "drop_path is None; it must be a number"),
        ({"stages": [{"dim": 32, "depth": 1}]}, "stages is .*; it must be a list, each entry a StageConfig"),
        ({"inputs": "image"}, "inputs is 'image'; it must be a list, each entry a name"),
        ({"norm": "no"}, "norm is 'no'; it must be true or false"),
        ({"norm_eps": "small"}, "norm_eps is 'small'; it must be a number"),
    ],
    # By the field: what is wrong with it need not be written alike in every process.
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_backbone_refuses_values_of_a_wrong_type(changes, message):
    with pytest.raises(ConfigError, match=f"BackboneConfig.{message}"):
        BackboneConfig(**({"dim": 32, "depth": 1} | changes))
    with pytest.raises(ConfigError):
        dataclasses.replace(BackboneConfig(dim=32, depth=1), **changes)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (GLAConfig, {"heads": "2"}, "GLAConfig.heads is '2'; it must be an integer or null"),
        (GLAConfig, {"heads": True}, "GLAConfig.heads is True; it must be an integer or null"),
        (MLPConfig, {"ratio": "4"}, "MLPConfig.ratio is '4'; it must be a number"),
        (PostConfig, {"multiplier": None}, "PostConfig.multiplier is None; it must be a number"),
        (FoldConfig, {"inner": "gla", "window": 7}, "FoldConfig.window is 7; it must be a list of 2, each an integer"),
        (FoldConfig, {"inner": "gla", "shift": (1, 2, 3)}, r"FoldConfig.shift is \(1, 2, 3\); it must be a list of 2"),
        (FoldConfig, {"inner": "gla", "groups": "row"}, "FoldConfig.groups is 'row'.*did you mean 'rows'"),
        (
            ParallelConfig,
            {"parts": ("gla", "linear"), "fuse": "max"},
            "ParallelConfig.fuse is 'max'; it must be one of",
        ),
        (MixtureOfDepthsConfig, {"block": "gla/mlp"}, "MixtureOfDepthsConfig.block is 'gla/mlp'.*a BlockConfig"),
        (BlockConfig, {"mixer": MLPConfig()}, "BlockConfig.mixer is MLPConfig.*options of a mixer or a name or null"),
        (StageConfig, {"dim": 8, "depth": "2"}, "StageConfig.depth is '2'; it must be an integer"),
        (om.GenerationConfig, {"forbidden": {1}}, "GenerationConfig.forbidden is .1.; it must be a list, each entry"),
        (om.GenerationConfig, {"stop": "end"}, "GenerationConfig.stop is .end.; it must be a list, each entry a list"),
        (PostConfig, {"multiplier": 10**310}, "PostConfig.multiplier is 1000.*; it must be a number"),
    ],
    ids=str,
)
def test_every_part_refuses_values_of_a_wrong_type(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BackboneConfig(dim=32, depth=1, residual="adaln"), r"'adaln' needs condition; pass AdaLNConfig\("),
        (lambda: StageConfig(dim=32, depth=1, transition="skip"), r"'skip' needs source; pass SkipConfig\(source="),
        (lambda: BackboneConfig(dim=32, depth=1, pattern=["cross_attention"]), "'cross_attention' needs source"),
        (lambda: FoldConfig(inner="fold"), r"'fold' needs inner; pass FoldConfig\(inner="),
    ],
)
def test_a_name_of_a_part_that_needs_options_says_which(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_both_ways_say_the_same():
    with pytest.raises(ConfigError) as made:
        GLAConfig(heads="2")
    with pytest.raises(ConfigError) as read:
        from_dict(GLAConfig, {"heads": "2"})
    assert str(made.value) == str(read.value)


def test_lists_become_tuples_and_integers_floats():
    config = BackboneConfig(dim=8, depth=2, pattern=["gla"], stages=[StageConfig(dim=8, depth=2)], drop_path=0)
    assert config.pattern == ("gla",) and isinstance(config.stages, tuple) and type(config.drop_path) is float
    assert FoldConfig(inner="gla", window=[3, 4]).window == (3, 4)
    assert om.GenerationConfig(forbidden=range(2), stop=[[1], (2, 3)]).stop == ((1,), (2, 3))
    assert pickle.loads(pickle.dumps(config)) == config
    assert om.Backbone(config).config is config


def test_every_registered_part_is_checked():
    configs = [registry.get(name).config for registry in REGISTRIES.values() for name in registry.names()]
    assert len(configs) > 40 and all(issubclass(config, Config) for config in configs)


def test_what_0_1_said_without_effect_still_loads():
    plain = {"dim": 16, "depth": 1, "pattern": ["attention"], "channel": "mlp", "channels": {}}
    assert from_dict(BackboneConfig, plain | {"scan": "temporal-first"}).scan == "bidirectional"
    assert from_dict(BackboneConfig, plain | {"scan": "forward"}).scan == "forward"
    assert from_dict(BackboneConfig, plain | {"scan": "hilbert", "pattern": ["gla"]}).scan == "hilbert"
