"""What users hold: a trained detector, and the verbs that make, judge and use one."""

from metr.api.model import METR

__all__ = ["METR"]
