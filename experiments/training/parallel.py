"""Data-parallel training: the processes that torchrun started as one group; a process alone is a group of one.

Every rank runs the same code. Each trains on its share of a batch, and torch's DistributedDataParallel averages the
gradients; the first rank alone has the run's folder, the ledger and the terminal. What one rank raises all raise, at
the next point where they agree, so that none waits for one that has ended.
"""

import gc
import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.accounting.ledger import BudgetExceeded
from experiments.run_folder.errors import RunFailed
from experiments.training.signals import handled

if TYPE_CHECKING:  # the command line asks for the rank before torch is wanted
    from experiments.settings.record import Settings
    from qwen_min import Qwen

T = TypeVar("T")

VERBS = ("study", "baseline", "default", "grid", "context", "final", "train")
"""What may run in several processes: the verbs that train."""

PATIENCE = timedelta(days=1)
"""How long a rank waits for the others: the first one judges a stage alone. A rank that died is noticed at once."""


def world() -> int:
    """How many processes torchrun started; 1 without it."""
    given = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return _number("WORLD_SIZE", 1, 2**20) if given else 1


def rank() -> int:
    """This process's number among them, from 0. Raises ValueError where it, or theirs, is none."""
    return _number("RANK", 0, of - 1) if (of := world()) > 1 else 0


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(f"{name} is {text!r}: expected a whole number from {least} to {most}, as torchrun sets it")
    return int(text)


class Alone:
    """A group of one process: its share is all, and every sum is its own number."""

    rank, world = 0, 1

    def check(self, settings: "Settings") -> None:
        """Take this rank's device. Raises ValueError for settings that the group cannot run with."""

    def of(self, model: "Qwen") -> "Alone":
        """The group, with the gradients of this model's `loss` averaged over it."""
        return self

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what is dealt out."""
        return items

    def loss(self, model: "Qwen", *batch, **options):
        """`model.loss` of a part of the batch."""
        return model.loss(*batch, **options)

    def averaging(self, now: bool) -> AbstractContextManager:
        """Around a forward and its backward: whether the gradient that has accumulated is averaged then."""
        return nullcontext()

    def draw(self, seed: int, step: int) -> None:
        """Begin the random draws of a step (dropout): they depend on the seed, the step and the rank alone."""
        import numpy as np
        import torch

        torch.manual_seed(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64).item())

    def sum(self, value):
        """The sum over ranks of an int, exact to 2^63, or of a float, in float64."""
        return value

    def any(self, flag: bool) -> bool:
        return bool(self.sum(int(flag)))

    def first(self, work: Callable[..., T], *args) -> T | None:
        """Let the first rank alone do it; the others get None."""
        return work(*args)

    def tell(self, work: Callable[..., Any], *args) -> Any:
        """What `work` gives on the first rank, which alone does it, or what it raises; bytes, or what JSON holds."""
        return work(*args)

    def only(self, manager: Callable[..., AbstractContextManager], *args) -> AbstractContextManager:
        """The context of `manager(*args)` on the first rank, and one that does nothing on the others."""
        return manager(*args)

    def together(self) -> AbstractContextManager:
        """Around what one rank may fail at: if one rank raises inside, every rank raises on exit.

        Inside, no rank may wait for others after a line that can fail on some of them alone.
        """
        return nullcontext()


ALONE = Alone()


class Mute:
    """Stands for what the first rank alone has, on the others: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self

    def __call__(self, *args, **kwargs) -> None:
        return None


class Ranks(Alone):
    """One of several processes of a `torch.distributed` group that has begun."""

    def __init__(self, rank: int, world: int, averaged: Any = None):
        self.rank, self.world, self._averaged = rank, world, averaged

    def check(self, settings: "Settings") -> None:
        import torch

        if settings.batch_size < self.world:
            raise ValueError(
                f"batch_size is {settings.batch_size}: expected a window or more for each of {self.world} processes"
            )
        if settings.device == "cpu":
            return
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if settings.device != "cuda" or local >= there:
            raise ValueError(
                f"device is {settings.device!r}: expected cpu, or cuda, of which each process of a machine takes one: "
                f"{there} are here, and this is process {local}"
            )
        torch.cuda.set_device(local)

    def of(self, model: "Qwen") -> "Ranks":
        import torch

        class Loss(torch.nn.Module):  # what DistributedDataParallel averages the gradients of is a module's forward
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, *batch, **options):
                return self.model.loss(*batch, **options)

        # Parameters need no first broadcast: they come from the same seed or checkpoint, and the base from its files.
        return Ranks(self.rank, self.world, torch.nn.parallel.DistributedDataParallel(Loss(), init_sync=False))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.world]

    def loss(self, model: "Qwen", *batch, **options):
        return self._averaged(*batch, **options)

    def averaging(self, now: bool) -> AbstractContextManager:
        return nullcontext() if now else self._averaged.no_sync()

    def sum(self, value):
        import torch

        total = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        torch.distributed.all_reduce(total)
        return total.item()

    def first(self, work: Callable[..., T], *args) -> T | None:
        return work(*args) if self.rank == 0 else None

    def tell(self, work: Callable[..., Any], *args) -> Any:
        value = None
        with self.together():
            value = self.first(work, *args)
        return self._broadcast(value, source=0)

    @contextmanager
    def only(self, manager: Callable[..., AbstractContextManager], *args) -> Iterator[Any]:
        with ExitStack() as held:
            with self.together():
                value = held.enter_context(manager(*args)) if self.rank == 0 else Mute()
            yield value

    @contextmanager
    def together(self) -> Iterator[None]:
        import torch

        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError, RunFailed) as e:
            if getattr(e, "agreed", False):  # all ranks are on their way out
                raise
            failure = e
        failed = torch.tensor(self.world if failure is None else self.rank)
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MIN)
        source = int(failed)
        if source == self.world:
            return
        of = next((i for i, kind in enumerate(_KINDS) if isinstance(failure, kind)), 0)
        of, text = self._broadcast([of, str(failure)], source)
        if failure is None or source != self.rank:  # made of the text alone
            failure = _KINDS[of].__new__(_KINDS[of], f"process {source}: {text}" if source else text)
        failure.agreed = True  # type: ignore[attr-defined]
        raise failure

    def _broadcast(self, value: Any, source: int) -> Any:
        """The `value` of rank `source`: bytes, or what JSON holds."""
        import torch

        data = b"=" + value if isinstance(value, bytes) else json.dumps(value).encode()
        size = torch.tensor(len(data))
        torch.distributed.broadcast(size, source)
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        held = sent if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
        torch.distributed.broadcast(held, source)
        data = held.numpy().tobytes()
        return data[1:] if data[:1] == b"=" else json.loads(data)


_KINDS = BudgetExceeded, RunFailed, OSError, ValueError
"""What decides the exit code of a failure: the first of these that it is."""


@contextmanager
def joined(verb: str, trains: bool) -> Iterator[Alone]:
    """The group of the processes that torchrun started, or `ALONE`.

    Raises:
        ValueError: several processes, and nothing that they could share. OSError: they do not find each other.
    """
    if world() == 1:
        yield ALONE
        return
    if not trains:
        raise ValueError(f"{verb} in {world()} processes: expected torchrun for training alone ({', '.join(VERBS)})")
    import torch

    # Numbers and messages are on the CPU, gradients where the model is.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Who waits for the others there sees no signal but one that ends it at once. Nothing has begun yet.
    try:
        with handled(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM):
            torch.distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise OSError(
            f"torchrun's processes do not find each other ({' '.join(str(e).split())[:120]}): expected all of them, "
            "and MASTER_ADDR and MASTER_PORT as it sets them"
        ) from None
    try:
        yield Ranks(rank(), world())
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)
        raise
    finally:
        # Whoever averaged gradients has to be gone before the group: if its reducer is the last to hold the group, that
        # ends with Python's lock held, and now and then waits forever for a thread of its own that wants the lock.
        gc.collect()
        torch.distributed.destroy_process_group()


def lost(error: Exception) -> bool:
    """Whether an error says that another process of the group is gone."""
    if world() == 1:
        return False
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)
