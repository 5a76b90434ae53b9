"""The accelerator beside other trainers of the same process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from metr.errors import MetrError
from metr.run_directory import RunDirectory
from metr.training.config import LoopConfig
from metr.training.distribution import build_accelerator


@pytest.fixture(autouse=True)
def _state_of_others() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_precision_of_another_trainer_is_told(tmp_path: Path) -> None:
    loop, folder = LoopConfig(device="cpu"), RunDirectory(tmp_path)
    Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(
        MetrError, match=r"(?s)another trainer of this process computes in bf16.*in a process of its own"
    ):
        build_accelerator(loop, folder)
    AcceleratorState._reset_state()
    assert build_accelerator(loop, folder).mixed_precision == "no"
    assert build_accelerator(loop, folder).mixed_precision == "no", "another METR of this process"
