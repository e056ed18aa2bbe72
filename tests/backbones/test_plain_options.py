"""Options of parts may be plain mappings in Python, as in files."""

from __future__ import annotations

import pytest

import omnimix as om
from omnimix.backbones.mixers.gla import GLAConfig
from omnimix.errors import ConfigError


def test_mappings_become_configurations():
    config = om.BackboneConfig(dim=8, depth=1, mixers={"gla": {"heads": 2}}, ffn={"type": "moe", "experts": 4})
    assert config.mixers == {"gla": GLAConfig(heads=2)}
    assert config.ffn.experts == 4
    assert om.BlockConfig(mixer={"type": "gla", "heads": 2}).mixer == GLAConfig(heads=2)


def test_mistakes_in_mappings_are_named():
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        om.BackboneConfig(dim=8, depth=1, mixers={"gla": {"haeds": 2}})
    with pytest.raises(ConfigError, match="must say by 'type'"):
        om.BackboneConfig(dim=8, depth=1, ffn={"experts": 4})
