"""Which evaluation is the best, and when training has learnt what it can: the best one is too long ago."""

import logging
import math

from metr.errors import did_you_mean
from metr.training.config import LoopConfig
from metr.training.state import Counters

_logger = logging.getLogger(__name__)


def is_best(counters: Counters, name: str) -> bool:
    """Whether the newest evaluation has the highest value so far of the metric of that name; says if there is none."""
    metrics, best = counters.metrics, counters.best
    if name not in metrics:
        told = "the evaluation gives no %r, by which loop.best_metric chooses the best checkpoint; %s"
        _logger.warning(told, name, did_you_mean(name, metrics))
        return False
    return math.isfinite(metrics[name]) and (best is None or metrics[name] > best)


def has_stalled(counters: Counters, loop: LoopConfig) -> bool:
    """Whether the last `loop.patience` evaluations brought no new best.

    It is read off the counters, so a run that is resumed decides as if nothing had happened. As long as nothing is
    found at all (a best of 0), training has not begun to show, and goes on.
    """
    if not loop.patience or not loop.evaluate_every or counters.best is None or counters.best <= 0:
        return False
    return counters.evaluated_step - counters.best_step >= loop.patience * loop.evaluate_every
