"""What omnimix uses of timm that timm keeps private; no other file does.

`tests/interop/test_private.py` says when a release of timm changes one of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from timm.models import _features

# timm takes any sequence, and declares lists.
feature_take_indices: Callable[[int, int | Sequence[int] | None], tuple[list[int], int]] = cast(
    Any, _features.feature_take_indices
)
