"""Training on several processes: the accelerator."""

import warnings

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from metr.process_group import joined_device
from metr.run_directory import RunDirectory
from metr.training.config import LoopConfig
from metr.training.logger import check_trackers


def build_accelerator(loop: LoopConfig, folder: RunDirectory) -> Accelerator:
    """The accelerator of a run, with its trackers. The trainer does autocast, so losses stay in float32.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
        MetrError: several processes were started that cannot work together.
    """
    check_trackers(loop.trackers)
    device = joined_device(loop.device)
    # The gradient of a 1 x 1 kernel has strides of its own. DDP copies it then, which costs next to nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        log_with=list(loop.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.trackers)),
    )
