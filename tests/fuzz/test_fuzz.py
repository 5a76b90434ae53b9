"""Some thirty seconds of damaged datasets, images, configurations and checkpoints; `make fuzz` runs for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZING = Path(__file__).parent / "fuzzing.py"
KINDS = ("annotations", "identities", "images", "configurations", "checkpoints")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="limits on time and memory are those of POSIX"),
]


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("annotations", 60), ("identities", 60), ("images", 300), ("configurations", 150), ("checkpoints", 40)],
)
def test_nothing_but_messages(kind: str, cases: int) -> None:
    """In a process of its own: there the shapes are not checked, as for users, who must get messages all the same."""
    counts = [part for one in KINDS for part in (f"--{one}", str(cases if one == kind else 0))]
    command = [sys.executable, str(FUZZING), *counts, "--seed", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert f"{kind}: {cases} tried" in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 0, ended.stdout + ended.stderr
