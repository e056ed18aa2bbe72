"""What torch keeps private and `utils/private_torch.py` uses does what is expected of it; a failure means that torch
has changed it, and that the file must follow."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from omnimix.utils import private_torch as private
from omnimix.utils.modes import constant_in_graphs

CPUINFO = Path("/proc/cpuinfo")


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_foreach_products_and_means_change_every_tensor_in_place():
    tensors = [torch.ones(2), torch.ones(3, 1)]
    private.foreach_mul_(tensors, 3.0)
    assert all(torch.equal(t, torch.full_like(t, 3)) for t in tensors)
    private.foreach_lerp_(tensors, [torch.zeros(2), torch.zeros(3, 1)], 0.25)
    assert all(torch.equal(t, torch.full_like(t, 2.25)) for t in tensors)


def test_dispatch_modes_are_counted_and_switched_off():
    assert private.dispatch_modes() == 0
    with _Counting() as mode:
        assert private.dispatch_modes() == 1
        with private.without_modes():
            assert private.dispatch_modes() == 0
            torch.ones(1) + 1
        assert mode.calls == 0
        torch.ones(1) + 1
        assert mode.calls > 0


def test_tracing_has_a_state_only_within_a_trace():
    states = []

    def traced(x):
        states.append(private.tracing_state())
        return x + 1

    assert private.tracing_state() is None
    torch.jit.trace(traced, torch.ones(1), check_trace=False)
    assert states[0] is not None


def test_transforms_of_functions_are_seen():
    seen = []

    def watched(x):
        seen.append(private.innermost_transform())
        return x.sum()

    assert private.innermost_transform() is None
    torch.func.grad(watched)(torch.ones(2))
    torch.func.vmap(watched)(torch.ones(2, 3))
    assert len(seen) == 2 and None not in seen


def test_levels_of_forward_differentiation_are_seen():
    assert not private.differentiates_forward()
    with forward_ad.dual_level():
        assert private.differentiates_forward()
    assert not private.differentiates_forward()


def test_the_mark_of_constants_is_the_one_that_torch_sets():
    def function():
        return 1

    assert getattr(constant_in_graphs(function), private.CONSTANT_MARK)
    assert getattr(torch.compiler.assume_constant_result(lambda: 1), private.CONSTANT_MARK)


def test_a_compiled_module_holds_its_own_under_this_name():
    layer = nn.Linear(2, 2)
    compiled = torch.compile(layer, backend="eager")
    assert private.inside_compiled(compiled) is layer and private.inside_compiled(layer) is None
    assert set(compiled.state_dict()) == {f"{private.COMPILED}.weight", f"{private.COMPILED}.bias"}


def test_every_kind_of_hook_touches_a_linear_layer():
    x = torch.ones(1, 2, requires_grad=True)
    for register in (
        nn.Module.register_forward_pre_hook,
        nn.Module.register_forward_hook,
        nn.Module.register_full_backward_pre_hook,
        nn.Module.register_full_backward_hook,
    ):
        layer, called = nn.Linear(2, 2), []
        assert private.untouched(layer)
        handle = register(layer, lambda *_: called.append(1))  # noqa: B023
        assert not private.untouched(layer), register.__name__
        layer(x).sum().backward()
        assert called
        handle.remove()
        assert private.untouched(layer)
    for register in (
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert not private.untouched(layer), register.__name__
        finally:
            handle.remove()
        assert private.untouched(layer)
    layer.forward = lambda x: x
    assert not private.untouched(layer)
    assert not private.untouched(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))


@pytest.mark.skipif(not CPUINFO.exists(), reason="the system names no flags of its processor")
def test_bf16_products_are_what_the_processor_names():
    flags = {flag for line in CPUINFO.read_text().splitlines() if line.startswith("flags") for flag in line.split()}
    assert private.multiplies_bf16() == bool(flags & {"avx512_bf16", "amx_tile"})


def test_arguments_of_ops_have_names():
    assert private.argument_names(torch.ops.aten.mm) == ["self", "mat2"]


def test_buffers_that_no_state_dict_holds_are_named():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("made", torch.ones(1), persistent=False)
    assert private.buffers_outside_state_dict(module) == {"made"} and set(module.state_dict()) == {"kept"}


def test_pytrees_of_registered_classes_come_apart_with_their_keys():
    class Pair:
        def __init__(self, left, right):
            self.parts = (left, right)

    private.pytree.register_pytree_node(
        Pair,
        lambda pair: (list(pair.parts), None),
        lambda parts, _: Pair(*parts),
        serialized_type_name="omnimix.tests.Pair",
        flatten_with_keys_fn=lambda pair: (
            [(private.pytree.GetAttrKey("left"), pair.parts[0]), (private.pytree.MappingKey("right"), pair.parts[1])],
            None,
        ),
    )
    mapped = private.pytree.tree_map_only(torch.Tensor, lambda t: t + 1, Pair(torch.zeros(1), "text"))
    assert mapped.parts == (torch.ones(1), "text")
    paths, _ = private.pytree.tree_flatten_with_path(Pair(1, 2))
    assert [private.pytree.keystr(path) for path, _ in paths] == [".left", "['right']"]
