"""What omnimix uses of timm that timm keeps private; no other file does.

`tests/interop/test_private.py` says when a release of timm changes one of them.
"""

from timm.models._features import feature_take_indices as feature_take_indices
