"""torch's flop counter sees what our custom ops compute."""

from __future__ import annotations

import pytest
import torch

from omnimix.kernels import Draw, flop_counter, ops
from omnimix.kernels.check import arguments_of, call_of, results

CASES = [
    pytest.param(op, case, backend.name, id=f"{op.name}-{case.name}-{backend.name}".replace(" ", "_"))
    for op in ops()
    if op.flops is not None
    for case in op.cases()[:1]
    for backend in op.backends
    if backend.name not in {"reference", "triton"}
]


@pytest.mark.parametrize(("op", "case", "backend"), CASES)
def test_the_flop_counter_counts_what_the_op_declares(op, case, backend):
    arguments = arguments_of(case, Draw.seeded(1, dtype=torch.float32), 2, 40, state=False)
    with flop_counter(display=False) as forward:
        call_of(op, backend)(**arguments)
    declared = op.flops(arguments)
    assert int(declared) <= forward.get_total_flops() <= 1.5 * declared
    with flop_counter(display=False) as both:
        results(call_of(op, backend), arguments)
    assert both.get_total_flops() >= 2.5 * declared
