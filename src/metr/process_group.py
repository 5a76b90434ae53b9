"""Several processes as one group: how they join it, what they tell each other, and what is said when one is lost.

`metr.processes` says how many there are, and which one this is. All processes must call the functions here together and
in the same order; where there is only one, each gives back at once what it was given.
"""

import atexit
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, distributed

from metr.devices import resolved_device
from metr.errors import MetrError
from metr.processes import in_main_process, process_count, process_index

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others in one exchange. They wait for the slowest share of an evaluation, and while
the main process computes metrics, draws or writes; a process that has ended is noticed long before."""
_PIECE = 1 << 24  # bytes that each process sends at a time
_POLL = 0.005  # seconds between two looks at an exchange
# what gloo and the sockets of torch say when another process is gone: in a RuntimeError, without a type of its own
_GONE = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "socket")
Value = TypeVar("Value")


def joined_device(wanted: str | torch.device) -> torch.device:
    """Joins the group of all processes, if there are several and this one has not joined yet.

    Args:
        wanted: The device that this run is to use: "auto", "cpu", "cuda", ...

    Returns:
        The device of this process: of several GPUs its own one.

    Raises:
        ConfigError: there is no such device here.
        MetrError: the processes cannot work together on such devices, or one of them cannot be reached.
    """
    device = resolved_device(wanted)
    if process_count() == 1:
        return device
    from accelerate import PartialState  # a single process does without this slow import

    with explained_loss_of_processes():
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    atexit.unregister(_leave)
    atexit.register(_leave)
    if state.num_processes != process_count():
        what = f"{process_count()} processes were started, but they cannot work together on the device {device}"
        hint = "start them with torchrun or accelerate launch; the device cpu works on every machine"
        raise MetrError(what, where="device", hint=hint)
    # where several processes use the CPU, accelerate numbers it ("cpu:1"), and torch copies tensors "to" it
    return torch.device("cpu") if state.device.type == "cpu" else torch.device(state.device)


def _leave() -> None:
    """Leaves gloo's group before the interpreter ends: a thread of it that still runs then would abort the process.

    Nobody is waited for. NCCL's group stays: leaving that waits for exchanges that a lost process never ends.
    """
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def gathered(rows: Tensor) -> Tensor:
    """The rows [n ...] of all processes on the CPU, one process after the other, in the main process.

    Processes may have different numbers of rows, also none. In the other processes the result has no rows.
    """
    if process_count() == 1:
        return rows
    counts = _counts(len(rows))
    most = max(1, _PIECE // (rows.element_size() * max(1, math.prod(rows.shape[1:]))))
    pieces: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), most):
        size = min(most, max(counts) - start)
        own = rows[start : start + size]
        sent = torch.zeros(size, *rows.shape[1:], dtype=rows.dtype, device=_device())
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in counts] if in_main_process() else None
        _exchange(distributed.gather, sent, received)
        for kept, piece, count in zip(pieces, received or (), counts, strict=False):
            kept.append(piece[: max(0, count - start)].cpu())
    return torch.cat([rows[:0].cpu(), *(piece for kept in pieces for piece in kept)])


def from_main(make: Callable[[], Value], kind: Any) -> Value:
    """What `make` gives in the main process, for every process. The others wait for it and do not call `make`.

    Args:
        make: Called in the main process alone. If it fails there, the launcher ends the others.
        kind: The type of the value, which travels as MessagePack: a dataclass, a dictionary, a number, ...
    """
    if process_count() == 1:
        return make()
    content = msgspec.msgpack.encode(make()) if in_main_process() else b""
    size = torch.tensor([len(content)], device=_device())
    _exchange(distributed.broadcast, size, 0)
    message = torch.zeros(int(size), dtype=torch.uint8, device=_device())
    if content:
        message.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    _exchange(distributed.broadcast, message, 0)
    value: Value = msgspec.msgpack.decode(message.cpu().numpy().tobytes(), type=kind)
    return value


@contextmanager
def explained_loss_of_processes() -> Iterator[None]:
    """Replaces what the exchange between processes raises when one of them is gone.

    Raises:
        MetrError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:  # also the base of torch's errors of distribution
        if not (isinstance(error, distributed.DistError) or _is_loss(error)):
            raise
        what = "another process of this run has ended, or cannot be reached; this one ends too"
        hint = (
            "the error of that process says why, or its launcher does; then resume the run, or give the command again"
        )
        raise MetrError(what, hint=hint) from error


def _is_loss(error: RuntimeError) -> bool:
    message = str(error).lower()
    return process_count() > 1 and any(part in message for part in _GONE)


def _counts(count: int) -> list[int]:
    """The counts of all processes, in each of them."""
    counts = torch.zeros(process_count(), dtype=torch.int64, device=_device())
    counts[process_index()] = count
    _exchange(distributed.all_reduce, counts)
    return [int(one) for one in counts.tolist()]


def _exchange(collective: Callable[..., distributed.Work | None], *arguments: object) -> None:
    """Takes part in an exchange, and waits in steps: Python handles signals between them, so they end the wait."""
    with explained_loss_of_processes():
        work = collective(*arguments, async_op=True)
        assert work is not None
        while not work.is_completed():
            time.sleep(_POLL)
        work.wait()


def _device() -> torch.device:
    """Where tensors must be for the processes to exchange them."""
    return joined_device("cpu") if distributed.get_backend() in ("gloo", "mpi") else joined_device("auto")
