"""Fixtures of the server."""

from served import served
from tiny import metr, tiny_run

__all__ = ["metr", "served", "tiny_run"]
