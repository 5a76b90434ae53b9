"""Fixtures of the outer layers."""

from tiny import metr, tiny_run

__all__ = ["metr", "tiny_run"]
