"""Real exporters and runtimes, in a process of their own: what they load and leave behind stays out of other tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_exports_of_every_family_and_format() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]
    file = Path(__file__).with_name("exported_families.py")
    ended = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=2400)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
