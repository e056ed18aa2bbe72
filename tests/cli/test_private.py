"""What Triton keeps private and `cli/private_triton.py` uses does what is expected of it; a failure means that Triton
has changed it, and that the file must follow."""

import pytest

from omnimix.cli.private_triton import active_driver


def test_another_driver_is_active_within_and_the_former_one_afterwards():
    driver = pytest.importorskip("triton.runtime").driver
    outer, inner = object(), object()
    with active_driver(outer):
        assert driver.active is outer
        with pytest.raises(ValueError, match="stop"), active_driver(inner):
            assert driver.active is inner
            raise ValueError("stop")
        assert driver.active is outer
