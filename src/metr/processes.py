"""The processes of a run that a launcher starts: how many there are, and which one this is. Imports no torch."""

import os

# the variables of torchrun and accelerate, then those of MPI's launchers, in the order in which accelerate reads them
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_INDICES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def process_count() -> int:
    """How many processes `torchrun`, `accelerate launch` or `mpirun` started; 1 without them."""
    return _first(_COUNTS, 1)


def process_index() -> int:
    """The number of this process, from 0."""
    return _first(_INDICES, 0)


def in_main_process() -> bool:
    """Whether this is the one of several processes that writes and shows."""
    return process_index() == 0


def is_launched() -> bool:
    """Whether a launcher has told this process which one it is; schedulers may do so where there is only one."""
    return "RANK" in os.environ or process_count() > 1


def is_kept_to_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")


def _first(names: tuple[str, ...], otherwise: int) -> int:
    """The first of these environment variables that holds a number."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), otherwise)
