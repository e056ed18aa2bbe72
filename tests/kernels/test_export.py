"""torch.export with a dynamic batch and length: no check of shapes and no choice of a backend may fix them."""

import pytest
import torch
from torch.export import Dim, export

from omnimix.cli.check_kernels import arguments_of
from omnimix.kernels import Draw, ops

# Their shapes are looked at in several ways; of the other ops the first case is enough.
ALL_CASES = {"gated_linear", "delta_rule", "linear_recurrence"}
CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}".replace(" ", "_"))
    for op in ops()
    if op.sequences
    for case in (op.cases() if op.name in ALL_CASES else op.cases()[:1])
]
BATCH, LENGTH = 3, 20


class Call(torch.nn.Module):
    """A call of an op whose tensors are inputs and whose other arguments are fixed."""

    def __init__(self, op, options):
        super().__init__()
        self.op, self.options = op, options

    def forward(self, tensors):
        return self.op.function(**tensors, **self.options)


def split(arguments):
    tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
    return tensors, {name: a for name, a in arguments.items() if name not in tensors}


@pytest.mark.parametrize(("op", "case"), CASES)
def test_batch_and_length_stay_dynamic(op, case, without_shape_checks):
    tensors, options = split(arguments_of(case, Draw.seeded(dtype=torch.float32), BATCH, LENGTH))
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=256)
    shapes = {}
    for name, x in tensors.items():
        steps = name in op.sequences and x.ndim >= 2 and tuple(x.shape[:2]) == (BATCH, LENGTH)
        shapes[name] = {0: batch, 1: length} if steps else {0: batch} if name == "initial_state" else {}
    with torch.no_grad():
        program = export(Call(op, options), (tensors,), dynamic_shapes=(shapes,), strict=False)
        other, _ = split(arguments_of(case, Draw.seeded(1, dtype=torch.float32), 5, 33))
        found, wanted = program.module()(other), op.function(**other, **options)
    for f, w in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-4)
