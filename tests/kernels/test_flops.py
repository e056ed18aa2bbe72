"""torch's flop counter sees what our custom ops compute."""

from __future__ import annotations

import pytest
import torch

from omnimix.cli.check_kernels import arguments_of, call_of, results
from omnimix.kernels import Draw, flop_counter, get_op, ops
from omnimix.kernels.registry import serves_everything

CASES = [
    pytest.param(op, case, backend.name, id=f"{op.name}-{case.name}-{backend.name}".replace(" ", "_"))
    for op in ops()
    if op.flops is not None
    for case in op.cases()
    for backend in op.backends
    if backend.name not in {"reference", "triton"}
    # What is called beside torch's dispatcher is seen by nobody, and does not serve under a counter.
    and backend.limits is serves_everything
]


@pytest.mark.parametrize(("op", "case", "backend"), CASES)
def test_the_flop_counter_counts_what_the_op_declares(op, case, backend):
    arguments = arguments_of(case, Draw.seeded(1, dtype=torch.float32), 2, 40, state=False)
    with flop_counter(display=False) as forward:
        call_of(op, backend)(**arguments)
    declared = op.flops(arguments)
    assert int(declared) <= forward.get_total_flops()
    # The narrow cases of test_time spend as much on biases as on weights; see below.
    assert forward.get_total_flops() <= 1.5 * declared or (op.name == "test_time" and "momentum" in arguments)
    with flop_counter(display=False) as both:
        results(call_of(op, backend), arguments)
    assert both.get_total_flops() >= 2.5 * declared


@pytest.mark.parametrize("hidden", [None, 64])
def test_momentum_is_counted(hidden):
    heads, width, out = 2, 32, hidden or 32
    draw = Draw.seeded(1, dtype=torch.float32)
    arguments = {name: draw.normal(1, 64, heads, width, scale=width**-0.5) for name in ("q", "k", "v")}
    arguments |= {"w1": draw.normal(heads, width, out), "b1": draw.normal(heads, out), "lr": draw.normal(1, 64, heads)}
    arguments |= {"norm_weight": draw.normal(heads, width), "norm_bias": draw.normal(heads, width), "chunk": 16}
    if hidden:
        arguments |= {"w2": draw.normal(heads, out, width), "b2": draw.normal(heads, width)}
    arguments["momentum"] = draw.uniform(0.0, 0.8, 1, 64, heads)
    op = get_op("test_time")
    with flop_counter(display=False) as counter:
        call_of(op, "chunked")(**arguments)
    assert 1 <= counter.get_total_flops() / op.flops(arguments) <= 1.1
