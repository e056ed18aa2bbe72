"""Several processes that train together: how they were started, and what they agree on."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ConfigError, LostProcess, OmnimixError
from ...utils.options import cores

T = TypeVar("T")
# What torch says in a process whose workers, or whose partners, have ended.
_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (exited unexpectedly|is killed by signal: \w+)")
_PARTNER = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|remote process exited|Timed out waiting \d+ms|NCCL [\w ]*error|"
    r"Socket Timeout|connection was (?:closed|reset)|heartbeat",
    re.IGNORECASE,
)


def lost_process(error: BaseException) -> str | None:
    """Which process has ended and what helps, where that is what an error comes from; None where it is not."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for each in chain:
        text = str(each)
        worker = _WORKER.search(text)
        if worker is not None:
            how = worker[1].replace("is killed", "it was killed")
            return f"a process that reads ahead has ended ({how}); if memory ran out, lower data.workers"
        if isinstance(each, dist.DistError) or (isinstance(each, RuntimeError) and _PARTNER.search(text)):
            if world_size() > 1 or started_by_torchrun():
                return f"a process that trains together with this one has ended ({_first_line(text)})"
        if isinstance(each, ConnectionError | EOFError) and _from_a_process(each):
            return f"a process that works for this one has ended ({type(each).__name__})"
    return None


@contextlib.contextmanager
def losses_named(remedy: str = "") -> Iterator[None]:
    """Within it, what the loss of another process raises is a LostProcess.

    Args:
        remedy: what follows the reason.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        reason = None if isinstance(error, OmnimixError) else lost_process(error)
        if reason is None:
            raise
        raise LostProcess(f"{reason}{remedy}") from error


def _from_a_process(error: BaseException) -> bool:
    """Whether another process was asked, and not a file or a pipe of the user's."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("multiprocessing.") for name in modules)


def _first_line(text: str) -> str:
    """The reason in what gloo or NCCL say, without the place in their sources."""
    found = _PARTNER.search(text)
    return found[0] if found else text.split("\n")[0][:200]


def started_by_torchrun() -> bool:
    """Whether the processes are there already; otherwise Lightning starts what `trainer.devices` asks for."""
    return dist.is_available() and dist.is_torchelastic_launched()


def local_processes() -> int:
    """How many processes torchrun has started on this machine; 1 without it."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if started_by_torchrun() else 1


def same_again(command: str) -> str:
    """How to start `command` with as many processes as torchrun has started here, if it was torchrun."""
    if not started_by_torchrun():
        return command
    machines = int(os.environ["WORLD_SIZE"]) // local_processes()
    nodes = f"--nnodes {machines} … " if machines > 1 else ""
    return f"torchrun {nodes}--nproc-per-node {local_processes()} -m {command}"


def trainer_of_torchrun(config: Any) -> dict[str, Any]:
    """What a trainer has to know of the processes that torchrun has started, where the user has not said it.

    Args:
        config: the trainer's options.

    Raises:
        ConfigError: the user has said something else.
    """
    if not started_by_torchrun():
        return {}
    local, world = local_processes(), int(os.environ["WORLD_SIZE"])
    if config.devices not in ("auto", -1, "-1", local, str(local)):
        raise ConfigError(
            f"trainer.devices is {config.devices!r}, and torchrun has started {local} processes a machine; leave it out"
        )
    if config.num_nodes not in (1, world // local):
        raise ConfigError(
            f"trainer.num_nodes is {config.num_nodes}, and torchrun runs on {world // local} machines; leave it out"
        )
    strategy = {"strategy": "ddp"} if world > 1 and config.strategy == "auto" else {}
    return {"devices": local, "num_nodes": world // local, **strategy}


def share_threads() -> None:
    """Under torchrun, which gives each process one thread: a part of the cores for each."""
    if local_processes() > 1:
        torch.set_num_threads(max(1, cores() // local_processes()))


def from_all_ranks(trainer: pl.Trainer, value: T) -> list[T]:
    """`value` of every process that trains together."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(values, value)
    return values


def world_size() -> int:
    """How many processes train together, once they do."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(first: Tensor, *others: Tensor | float | int) -> tuple[Any, ...]:
    """Each value summed over the processes, in float64 on the device of the first; alone, just these.

    With the mean over a rank's n items as its loss, n · ranks / Σ n is the factor by which the average of the ranks'
    gradients is that of the mean over all their items.
    """
    if world_size() == 1:
        return first, *others
    values = [torch.as_tensor(value, dtype=torch.float64, device=first.device) for value in (first, *others)]
    total = torch.stack(values)
    dist.all_reduce(total)
    return tuple(total)


class Agreement:
    """Whether any process wants something, which all of them learn at the same call.

    All must call it equally often. A call says what was wished at the call before, so that none waits for the slowest
    and a GPU not for its queue. Alone, a wish comes true at once.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None

    def start(self, trainer: pl.Trainer) -> None:
        """Call it on all ranks, before the first question."""
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._pending = None

    def __call__(self, wish: bool) -> bool:
        if self._group is None:
            return wish
        said = self._collect()
        if not said:
            flag = torch.tensor(int(wish))
            self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        return said

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        (work, flag), self._pending = self._pending, None
        work.wait()
        return bool(flag)

    def end(self) -> None:
        """Call it on all ranks, after the last question."""
        self._collect()
