"""Every number of every configuration: what is not finite is refused by name, as is what is no number."""

import dataclasses
import importlib
import inspect
import math
import pkgutil

import jaxtyping
import pytest

from omnimix import backbones
from omnimix.backbones import BackboneConfig, BlockConfig, StageConfig
from omnimix.backbones.language import LanguageModelConfig
from omnimix.backbones.mixers.cross_attention import CrossAttentionConfig
from omnimix.backbones.residual.adaln import AdaLNConfig
from omnimix.backbones.transition.skip import SkipConfig
from omnimix.backbones.wrappers.fold import FoldConfig
from omnimix.backbones.wrappers.low_rank import LowRankDeltasConfig
from omnimix.backbones.wrappers.mixture_of_depths import MixtureOfDepthsConfig
from omnimix.backbones.wrappers.parallel import ParallelConfig
from omnimix.errors import ConfigError

# Of configurations without defaults for everything.
REQUIRED = {
    AdaLNConfig: {"condition": 8},
    BackboneConfig: {"dim": 8, "depth": 1},
    CrossAttentionConfig: {"source": "memory"},
    FoldConfig: {"inner": "gla"},
    LanguageModelConfig: {"vocab_size": 8, "backbone": BackboneConfig(dim=8, depth=1)},
    LowRankDeltasConfig: {"inner": "gla"},
    MixtureOfDepthsConfig: {"block": BlockConfig(mixer="gla", ffn=None)},
    ParallelConfig: {"parts": ("gla", "attention")},
    SkipConfig: {"source": "stages.0"},
    StageConfig: {"dim": 8, "depth": 1},
}
NUMBERS = ("int", "float", "int | None", "float | None")


def numbers():
    """(configuration's class, name of a field that holds a number), for every class within omnimix.backbones."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(backbones.__path__, "omnimix.backbones.")]
    classes = {c for m in modules for name, c in vars(m).items() if inspect.isclass(c) and dataclasses.is_dataclass(c)}
    named = [c for c in classes if c.__name__.endswith("Config") or c.__name__ == "RopeScaling"]
    found = [(c, f.name) for c in named for f in dataclasses.fields(c) if f.type in NUMBERS]
    return sorted(found, key=lambda one: (one[0].__name__, one[1]))


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """Without the checks of annotations that only tests have."""
    monkeypatch.setitem(jaxtyping.config.__dict__, "jaxtyping_disable", True)


@pytest.mark.parametrize(("config", "name"), numbers(), ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_number_is_taken_that_is_none(config, name):
    config(**REQUIRED.get(config, {}))
    for value in (math.nan, math.inf, -math.inf, "1", True):
        with pytest.raises(ConfigError, match=name):
            config(**REQUIRED.get(config, {}) | {name: value})


def test_there_are_numbers():
    assert {c.__name__ for c, _ in numbers()} >= {"AttentionConfig", "GenerationConfig", "MoEConfig", "RopeScaling"}
