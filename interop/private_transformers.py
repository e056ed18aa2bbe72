"""What omnimix uses of transformers that transformers keeps private; no other file does.

`tests/interop/test_private.py` says when a release of transformers changes one of them.
"""

from torch import nn


def loaded(parameter: nn.Parameter) -> bool:
    """Whether the values of a parameter come from a checkpoint that is being loaded."""
    return getattr(parameter, "_is_hf_initialized", False)
