"""How often a step makes the host wait for the device. Counted on the CPU: the operations are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same, evaluate
from test_trainer import Sick

from device_waits import DeviceWaits
from metr.errors import MetrError
from metr.layers import deformable_attention
from metr.structures import Batch
from metr.training.logger import read_metrics
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

MATCHING = "metr/losses/matcher.py:_assign"
"""The matching's transfer of costs to the CPU, one a batch."""


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deformable attention takes the way of accelerators, and numbers are read for lines of metrics.jsonl only."""
    monkeypatch.setattr(deformable_attention, "sample_rows", deformable_attention.sample_grids)
    made = Trainer.__init__

    def reads_seldom(self: Trainer, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self._reads_every_step = False

    monkeypatch.setattr(Trainer, "__init__", reads_seldom)


def begun(folder: Path, steps: int, model: dict[str, Any] | None = None, **loop: Any) -> tuple[Trainer, list[Batch]]:
    """A trainer that clips, averages weights and has running statistics, and its first batches; one step is made."""
    parts = make_parts(folder, **{"encoder": "hybrid"} | (model or {}))
    trainer = Trainer(parts, make_config(100, loop={"accumulation": 2, "log_every": 50} | loop), folder / "run")
    stream = iter(parts.loader(seed=0, start=0, rank=0, world=1, device=torch.device("cpu")))
    batches = [next(stream) for _ in range(2 * steps + 2)]
    trainer.network.train()
    trainer._run_logger.__enter__()
    trainer._advance(iter(batches[:2]))
    return trainer, batches[2:]


@pytest.mark.parametrize("encoder", ["deformable", "hybrid", "plain"])
def test_a_step_waits_for_its_matching_alone(tmp_path: Path, encoder: str) -> None:
    """Besides the costs, the number of pairs that may match is needed: two waits a batch, at the same moment."""
    trainer, batches = begun(tmp_path, 3, {"encoder": encoder})
    stream = iter(batches)
    with DeviceWaits() as waits:
        for _ in range(3):
            trainer._advance(stream)
            assert not trainer._shall_stop()
    assert waits.counted == {f"cpu {MATCHING}": 6, "nonzero metr/losses/matcher.py:_pairs": 6}


def test_a_sample_of_a_large_vocabulary_is_one_wait_more(tmp_path: Path) -> None:
    trainer, batches = begun(tmp_path, 1, vocabulary_sample=3)
    with DeviceWaits() as waits:
        trainer._advance(iter(batches))
    assert waits.without("matcher.py") == 2
    assert waits.counted["tolist metr/training/step_targets.py:sample_vocabulary"] == 2


def test_logging_reads_the_numbers_of_all_steps_at_once(tmp_path: Path) -> None:
    trainer, batches = begun(tmp_path, 3, log_every=4)
    stream = iter(batches)
    with DeviceWaits() as waits:
        for _ in range(3):
            trainer._advance(stream)
    assert waits.without("matcher.py") == 1
    assert trainer.counters.window.steps == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize("encoder", ["deformable", "hybrid", "plain"])
def test_detection_never_waits(tmp_path: Path, encoder: str) -> None:
    trainer, batches = begun(tmp_path, 1, {"encoder": encoder})
    network = trainer.plain_network.eval()
    with DeviceWaits() as waits, torch.inference_mode():
        network(batches[0].images, batches[0].padding_mask, trainer.step_targets.text)
    assert not waits.counted


def test_what_counts_as_a_wait() -> None:
    numbers = torch.arange(4.0)
    with DeviceWaits() as waits:
        numbers.sum().item()
        bool(numbers.any())
        numbers.nonzero()
        numbers[numbers > 1]
        numbers.unique()
        numbers.tolist()
        numbers.cpu()
        torch.repeat_interleave(torch.arange(2))
        numbers[torch.tensor([1, 2])]
        numbers.where(numbers > 1, 0)
        numbers.repeat_interleave(2)
    assert waits.number == 8


# what is read later is the same


@pytest.mark.trains
def test_reading_seldom_writes_what_reading_every_step_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = {"log_every": 4, "evaluate_every": 3, "checkpoint_every": 5, "accumulation": 2}
    for name, every in (("seldom", False), ("often", True)):
        parts = make_parts(tmp_path, criterion=Sick(2, 9), encoder="hybrid")
        trainer = Trainer(parts, make_config(8, loop=loop), tmp_path / name, evaluate=evaluate)
        trainer._reads_every_step = every
        trainer.fit()
        assert trainer.counters.skipped == 2
    assert_same(tmp_path / "seldom", tmp_path / "often")


def test_skipped_steps_are_named_later_by_their_own_number_and_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(make_parts(tmp_path, criterion=Sick(2)), make_config(6), tmp_path / "run")
    trainer.fit()
    [message] = [message for message in caplog.messages if "is skipped" in message]
    assert message.startswith("step 3 is skipped: decoder.1/l1 not finite; images: ")
    assert [record["skipped"] for record in read_metrics(tmp_path / "run")] == [1]
    assert json.loads((tmp_path / "run" / "state" / "state.json").read_text())["skipped"] == 1


def test_it_gives_up_at_the_same_step_though_it_reads_seldom(tmp_path: Path) -> None:
    config = make_config(40, loop={"max_skipped": 4, "log_every": 30, "checkpoint_every": 3})
    trainer = Trainer(make_parts(tmp_path, criterion=Sick(*range(4, 50))), config, tmp_path / "run")
    with pytest.raises(MetrError, match=r"step 8: 4 steps in a row .*: decoder.1/l1\n.*learning_rate"):
        trainer.fit()
    assert trainer.counters.step <= 12
