"""Adds boxes to the annotation files of a copied dataset and leaves the rest of their bytes as they are."""

from metr.data.appending.append import append
from metr.data.appending.base import Addition, CannotAppendError

__all__ = ["Addition", "CannotAppendError", "append"]
