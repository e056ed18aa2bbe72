"""What `test_ranks.py` runs in two processes: `torchrun --nproc-per-node 2 ranks_program.py`."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from omnimix.backbones import BackboneConfig, Context, LanguageModel, LanguageModelConfig
from omnimix.backbones.config import Site
from omnimix.backbones.ffn.moe import MoE, MoEConfig
from omnimix.recipes.common.loading import EpochLoader
from omnimix.recipes.common.optimisers import parameter_groups
from omnimix.recipes.common.ranks import Agreement, summed
from omnimix.recipes.common.strategies import shard, sharded
from omnimix.recipes.common.training import TrainingConfig

ROWS, STEPS = 3, 4


class Lines:
    """Rows of tokens of different lengths, which follow from their key alone."""

    def __len__(self) -> int:
        return 2 * ROWS * STEPS

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(100 * key[0] + key[1])
        return torch.randint(50, (12,), generator=generator), 3 + key[1] % 9


def batches(rows: int, rank: int, world: int):
    loader = EpochLoader(Lines(), batch_size=rows, seed=5, shuffle=True, rank=rank, world=world)
    loader.set_epoch(1)
    for batch in loader:
        yield torch.stack([tokens for tokens, _ in batch]), torch.tensor([length for _, length in batch])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        backbone = BackboneConfig(dim=16, depth=2, pattern=("attention", "gla"))
        self.model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=50)).double()

    def training_step(self, batch, index=0):
        found = self.model.loss(batch[0], lengths=batch[1])
        return {"loss": found.loss, "count": found.count}

    forward = validation_step = test_step = training_step


def train(module: pl.LightningModule, step, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The gradients of the first step; the weights move on."""
    optimizer = torch.optim.AdamW(
        parameter_groups(module, TrainingConfig(lr=1e-2, weight_decay=0.1)), lr=1e-2, betas=(0.9, 0.95)
    )
    first = {}
    for batch in batches(2 * ROWS // world, rank, world):
        found = step(batch)
        [count] = summed(torch.tensor(found["count"])) if world > 1 else [found["count"]]
        (found["loss"] * found["count"] * world / count).backward()
        if not first:
            first = {n: whole(p.grad).clone() for n, p in module.named_parameters()}
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return first


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        error = float((found[name] - expected[name]).abs().max())
        assert error < 1e-9, f"{what} {name} is off by {error}"


def weights(module) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()) for name, p in module.named_parameters()}


def ranks_equal_one(mesh, rank: int) -> None:
    alone = Module()
    gradients = train(alone, alone.training_step, 0, 1)

    module = Module()
    close(train(module, DistributedDataParallel(module), rank, 2), gradients, "DDP gradient")
    close(weights(module), weights(alone), "DDP weight")

    module = Module()
    marks = {name: vars(p) for name, p in module.named_parameters()}
    shard(module, mesh)
    for name, p in module.named_parameters():
        vars(p).update(marks[name])
    assert sharded(module)
    close(train(module, module.training_step, rank, 2), gradients, "FSDP gradient")
    close(weights(module), weights(alone), "FSDP weight")


class Routed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = MoEConfig(experts=2, active=1, ratio=1.0, balance=0.0)
        self.model = torch.nn.Sequential(MoE(8, config, Site())).double()
        # What is along the first channel goes to the first expert, and what is against it to the second.
        with torch.no_grad():
            self.model[0].router.weight.zero_()
            self.model[0].router.weight[:, 0] = torch.tensor([1.0, -1.0])

    def training_step(self, x):
        out = self.model[0](x, Context())
        return F.mse_loss(out.y, torch.ones_like(out.y)) + sum(out.losses.values())

    forward = validation_step = test_step = training_step


def routing_may_be_disjoint(mesh, rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    x[0, :, 0], x[1, :, 0] = 2.0, -2.0
    alone = Routed()
    alone.training_step(x).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}

    module = Routed()
    parallel = DistributedDataParallel(module)
    parallel(x[rank : rank + 1]).backward()
    assert module.model[0].load.tolist() == ([5, 0] if rank == 0 else [0, 5])
    close({name: p.grad for name, p in module.named_parameters()}, expected, "DDP expert")

    module = Routed()
    shard(module, mesh)
    module.training_step(x[rank : rank + 1]).backward()
    close({name: whole(p.grad) for name, p in module.named_parameters()}, expected, "FSDP expert")


def a_wish_of_one_is_heard_by_all(rank: int) -> None:
    class Trainer:
        world_size = 2

    agree = Agreement()
    agree.start(Trainer())
    # The second wishes at its third call, and both hear of it at their fourth.
    assert [agree(rank == 1 and call == 2) for call in range(4)] == [False, False, False, True]
    agree.end()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (2,))
    ranks_equal_one(mesh, rank)
    routing_may_be_disjoint(mesh, rank)
    a_wish_of_one_is_heard_by_all(rank)
    dist.barrier()
    if rank == 0:
        print("all equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
