"""METR: one object detector from many isolated datasets."""

__version__ = "0.1.0"
