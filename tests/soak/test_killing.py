"""Thirty kills at moments that a seed decides; `make soak` makes a thousand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).parent / "killing.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks for processes in /proc"),
]


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """In a process of its own: there the shapes are not checked, which draws random numbers."""
    command = [sys.executable, str(KILLING), "--kills", "30", "--keep", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "METR_CACHE": ""})
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-3000:]
    assert " 0 failures" in ended.stdout
