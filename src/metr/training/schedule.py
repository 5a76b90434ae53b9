"""The learning rate over the steps: linear warm-up, then a half cosine, flat first if wished."""

import math

from metr.training.config import ScheduleConfig


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The share of its height that the learning rate has in one step.

    Args:
        step: The step about to be made, from 0 on.
        steps: All steps of the training.
        config: Warm-up, shape and floor.

    Returns:
        A number in 0..1: rising to 1 in the last step of the warm-up, `floor` in the last step of a cosine.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    start = warmup if config.kind == "cosine" else max(warmup, round(config.flat_fraction * steps))
    if step < start:
        return 1.0
    share = min((step - start + 1) / (steps - start), 1.0)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * share))
