"""What timm and transformers keep private and `interop/private_*.py` use does what is expected of it; a failure means
that they have changed it, and that the file must follow."""

import pytest
import torch
from torch import nn

from omnimix.interop.private_timm import feature_take_indices


@pytest.mark.parametrize(
    ("indices", "expected"), [(None, ([0, 1, 2, 3], 3)), (2, ([2, 3], 3)), ([0, -2], ([0, 2], 2)), ((1,), ([1], 1))]
)
def test_indices_of_blocks_are_those_that_timm_takes(indices, expected):
    assert feature_take_indices(4, indices) == expected


def test_indices_out_of_range_are_refused():
    with pytest.raises(AssertionError, match="out of range"):
        feature_take_indices(4, [4])


def test_transformers_marks_what_it_has_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    from omnimix.interop.private_transformers import loaded

    seen: dict[str, bool] = {}

    class Config(transformers.PretrainedConfig):
        model_type = "omnimix_test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.held, self.added = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.post_init()

        def _init_weights(self, module):
            names = {id(p): name for name, p in self.named_parameters()}
            seen.update({names[id(p)]: loaded(p) for p in module.parameters(recurse=False)})
            for p in module.parameters(recurse=False):
                nn.init.zeros_(p)

    model = Model(Config())
    assert not any(loaded(p) for p in model.parameters())
    weights = {"held.weight": torch.ones(2, 2)}
    seen.clear()
    Model.from_pretrained(None, config=Config(), state_dict=weights)
    assert not seen["added.weight"] and seen.get("held.weight", True)
