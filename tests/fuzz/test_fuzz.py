"""Some thirty seconds of damaged datasets, images, configurations and checkpoints; `make fuzz` runs for longer."""

import logging
import os
from pathlib import Path

import pytest
from fuzzing import Fuzzer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.name == "nt", reason="limits on time and memory are those of POSIX"),
]


@pytest.fixture(autouse=True)
def _quiet() -> object:
    """Thousands of warnings about damaged files say nothing here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("annotations", 60), ("identities", 60), ("images", 300), ("configurations", 150), ("checkpoints", 40)],
)
def test_nothing_but_messages(kind: str, cases: int, tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path, 0)
    fuzzer.run(kind, cases)
    assert fuzzer.report.tried[kind] == cases
    assert not fuzzer.report.failures, str(fuzzer.report)
