"""Several processes: starts those that `accelerate launch --cpu` leaves out, and lets errors be said once."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from metr.errors import MetrError
from metr.processes import in_main_process, is_kept_to_cpu, is_launched
from metr.training.signals import Stopped, StopSignals

__all__ = ["start_processes_of_accelerate", "wait_for_main_process"]

_PATIENCE = 10.0
"""Seconds that another process leaves the main one to say the same error. A launcher ends it sooner if that happens."""


def start_processes_of_accelerate() -> None:
    """Starts the processes that `accelerate launch --cpu --num_processes N` was asked for, and ends as they end.

    On CPUs accelerate starts a single process, unless it is given an MPI host file; only the address for several tells
    that they were asked for. Then this process becomes their launcher: torch's own. Does nothing anywhere else.

    Raises:
        MetrError: it cannot be found out how many processes were asked for, or a process was ended by a signal.
        SystemExit: the processes have ended.
    """
    if not is_kept_to_cpu() or "MASTER_PORT" not in os.environ or is_launched():
        return
    asked = _asked_of_accelerate()
    count, machines = asked.num_processes, asked.num_machines or 1
    options = [f"--nproc-per-node={max(1, count // machines)}"]
    if machines > 1:
        place = f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"
        options += [f"--nnodes={machines}", f"--node-rank={asked.machine_rank or 0}", *place]
    _run([*options, *sys.argv])


def wait_for_main_process(signals: StopSignals) -> None:
    """Before an error of another than the main process is shown: ends it in silence if the main one has the same.

    Most errors are those of all processes. The main one says it at once, and with it the launcher ends the others; so
    an error that is still there after some seconds is this process's alone.

    Raises:
        SystemExit: this process was told to end.
    """
    end = time.monotonic() + (0 if in_main_process() else _PATIENCE)
    try:
        while time.monotonic() < end:
            if signals.requested:
                sys.exit(1)
            time.sleep(0.05)
    except Stopped:
        sys.exit(1)


def _asked_of_accelerate() -> Any:
    """The options of the `accelerate launch` that started this process, which hands the number of processes to nobody.

    Raises:
        MetrError: they cannot be found out.
    """
    import psutil
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked = None
    try:
        line = psutil.Process(os.getppid()).cmdline()
        asked = launch_command_parser().parse_args(_options_of_launch(line))
        if asked.num_processes is None:
            config = load_config_from_file(asked.config_file)
            asked.num_processes, asked.num_machines = config.num_processes, config.num_machines
    except (psutil.Error, OSError, ValueError, SystemExit):
        asked = None
    if asked is None or not isinstance(asked.num_processes, int):
        what = "accelerate starts only one process on the CPU, and does not say how many were asked for"
        raise MetrError(what, hint='torchrun --nproc-per-node N "$(which metr)" ...')
    return asked


def _options_of_launch(line: Sequence[str]) -> list[str]:
    """What follows `launch` in a command line of accelerate.

    Raises:
        ValueError: it is no such command line.
    """
    for number, word in enumerate(line):
        if word == "launch" or word.replace("/", ".").removesuffix(".py").endswith(
            ("accelerate-launch", "accelerate.commands.launch")
        ):
            return list(line[number + 1 :])
    raise ValueError(line)


def _run(arguments: Sequence[str]) -> None:
    """Runs torch's launcher, without the traceback and the table in which it repeats what its processes have said."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            what = f"process {rank} was ended by {failure.signal_name()}; the launcher ended the others"
            raise MetrError(what, hint="if nobody sent the signal, the memory may have run out") from None
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)
