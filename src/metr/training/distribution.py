"""Training on several processes: the accelerator."""

import warnings

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import ProjectConfiguration, parse_flag_from_env

from metr.errors import ConfigError, MetrError
from metr.process_group import joined_device
from metr.run_directory import RunDirectory
from metr.training.config import LoopConfig
from metr.training.logger import check_trackers

# the variables by which `accelerate launch` tells that it was given these options
_OPTIONS_OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}


def build_accelerator(loop: LoopConfig, folder: RunDirectory) -> Accelerator:
    """The accelerator of a run, with its trackers. The trainer does autocast, so losses stay in float32.

    Raises:
        ConfigError: a tracker is unknown, its package is not installed, or accelerate is to shard by itself.
        MetrError: several processes were started that cannot work together, or another trainer of this process
            (transformers') computes in another precision.
    """
    check_trackers(loop.trackers)
    for variable, option in _OPTIONS_OF_ACCELERATE.items():
        if parse_flag_from_env(variable):
            hint = f"start it without {option} (or set that to false in accelerate's configuration)"
            what = f"accelerate launch was told to use {option}, but METR shards networks itself (train.parallel=fsdp)"
            raise ConfigError(what, where="train.parallel", hint=hint)
    if is_initialized() and (theirs := AcceleratorState().mixed_precision) != "no":
        what = f"another trainer of this process computes in {theirs}, and accelerate has one precision for a process"
        raise MetrError(
            what, hint="train in a process of its own, or after AcceleratorState._reset_state() of accelerate"
        )
    device = joined_device(loop.device)
    # The gradient of a 1 x 1 kernel has strides of its own. DDP copies it then, which costs next to nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        log_with=list(loop.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.trackers)),
    )
