"""Training on several processes: the accelerator, and what is said when one of them is lost."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration
from torch import distributed

from metr.data.loading import explained_loss_of_workers
from metr.devices import resolved_device
from metr.errors import MetrError
from metr.processes import process_count
from metr.run_directory import RunDirectory
from metr.training.config import LoopConfig
from metr.training.logger import check_trackers

# what gloo and the sockets of torch say when another process is gone: in a RuntimeError, without a type of its own
_GONE = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "socket")


def build_accelerator(loop: LoopConfig, folder: RunDirectory) -> Accelerator:
    """The accelerator of a run, with its trackers. The trainer does autocast, so losses stay in float32.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
        MetrError: several processes were started that cannot work together.
    """
    check_trackers(loop.trackers)
    device = resolved_device(loop.device)
    # Evaluation in the main process may keep the others waiting for long.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    # The gradient of a 1 x 1 kernel has strides of its own. DDP copies it then, which costs next to nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
    with explained_loss_of_processes():
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            log_with=list(loop.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.trackers)),
            kwargs_handlers=[patience],
        )
    if accelerator.num_processes != process_count():
        what = f"{process_count()} processes were started, but they cannot exchange gradients on the device {device}"
        hint = "start them with torchrun or accelerate launch; train.loop.device=cpu works on every machine"
        raise MetrError(what, where="train.loop.device", hint=hint)
    return accelerator


@contextmanager
def explained_loss_of_processes() -> Iterator[None]:
    """Replaces what the exchange between processes raises when one of them is gone, and what the loss of a worker does.

    Raises:
        MetrError: another process has ended, or cannot be reached.
        DataError: a process that reads images died.
    """
    try:
        with explained_loss_of_workers():
            yield
    except RuntimeError as error:  # also the base of torch's errors of distribution
        if not (isinstance(error, distributed.DistError) or _is_loss(error)):
            raise
        what = "another process of this run has ended, or cannot be reached; this one ends too"
        hint = "the error of that process says why, or its launcher does; then resume the run"
        raise MetrError(what, hint=hint) from error


def _is_loss(error: RuntimeError) -> bool:
    message = str(error).lower()
    return process_count() > 1 and any(part in message for part in _GONE)
