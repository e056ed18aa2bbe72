"""What `test_sharding.py` runs in two processes: every system with its weights in shards is what it is whole."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from systems import System, systems

from omnimix.backbones import Backbone
from omnimix.recipes.common.strategies import shard_backbone


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def outcome(net: Backbone, system: System, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The outputs of some rows of a batch of four, and the gradients of the mean loss of its rows."""
    x = system.tokens(4)[rows]
    context = system.context(x, rows=rows)
    out = net(x, context)
    # The state too carries gradients.
    state = [] if out.state is None else [t for t in out.state.tensors() if t.is_floating_point()]
    loss = out.y.square().sum() + sum(t.square().sum() for t in state) + sum(out.losses.values()) * 0
    (loss / len(x)).backward()
    return out.y, {name: whole(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (2,))
    for name, system in systems().items():
        y, gradients = outcome(system.backbone(), system, slice(0, 4))
        net = system.backbone()
        shard_backbone(net, mesh)
        rows = slice(2 * rank, 2 * rank + 2)
        found, own = outcome(net, system, rows)
        torch.testing.assert_close(found, y[rows], rtol=1e-9, atol=1e-9)
        assert own.keys() == gradients.keys(), f"{name}: {own.keys() ^ gradients.keys()}"
        for parameter, gradient in gradients.items():
            error = float((own[parameter] - gradient).abs().max() / (1 + gradient.abs().max()))
            assert error < 1e-9, f"{name}: the gradient of {parameter} is off by {error}"
        dist.barrier()
        if rank == 0:
            print(name, flush=True)
    if rank == 0:
        print("all equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
