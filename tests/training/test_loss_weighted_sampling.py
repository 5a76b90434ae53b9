"""Shares that follow the losses: decided when said, told in time, and found again by a resumed run."""

import json
import logging
import signal
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import make_config, make_datasets, make_parts

from metr.checkpoint import load_checkpoint
from metr.data.config import HardnessConfig, LoaderConfig
from metr.data.loading import build_train_loader
from metr.data.mixture import hardness_weights
from metr.data.samplers import MixedSampler
from metr.errors import ConfigError
from metr.training.loss_weighted_sampling import HardnessFollower
from metr.training.metrics import read_metrics
from metr.training.state import Counters, HardnessState, StepReport
from metr.training.trainer import Trainer

BASE = {"cells": 0.5, "fish": 0.5}


def mixed(**options: Any) -> MixedSampler:
    return MixedSampler({"cells": 30, "fish": 20}, BASE, 4, **options)


def figures(cells: tuple[float, float], fish: tuple[float, float]) -> dict[str, float]:
    pairs = {"cells": cells, "fish": fish}
    return {f"hardness/{kind}/{name}": pairs[name][i] for i, kind in enumerate(("loss", "objects")) for name in pairs}


def followed(steps: int, config: HardnessConfig, state: HardnessState | None = None) -> tuple[Counters, MixedSampler]:
    """Steps of eight images, in which cells become easier and easier, and fish have no object in the first five."""
    counters, one = Counters(hardness=state or HardnessState()), mixed()
    follower = HardnessFollower(one, config, counters.hardness)
    for step in range(1, steps + 1):
        fish = (8.0, 2.0) if step > 5 else (0.0, 0.0)
        report = StepReport(learning_rate={}, figures=figures((4.0 / step, 2.0), fish), images=8)
        counters.add(report)
        follower.after(report, counters)
    return counters, one


def test_shares_rest_on_the_period_before_the_last() -> None:
    config = HardnessConfig(every=3)
    counters, one = followed(12, config)
    means = [sum(2 / step for step in range(first, first + 3)) / 3 for first in (1, 4, 7, 10)]
    losses = [{"cells": mean} | ({"fish": 4.0} if number else {}) for number, mean in enumerate(means)]
    expected = [(24 * (number + 2), hardness_weights(BASE, known, config)) for number, known in enumerate(losses)]
    assert [draw for draw, _ in counters.hardness.changes] == [draw for draw, _ in expected]
    for (draw, shares), (_, wanted) in zip(counters.hardness.changes, expected, strict=True):
        assert shares == pytest.approx(wanted)
        assert one.shares(draw) == shares
        assert one.shares(draw - 1) != shares or draw == 48
    assert one.shares(47) == one.shares(0) == BASE
    assert counters.hardness.losses == pytest.approx(losses[-1])
    assert counters.hardness.sums == {}
    assert one.shares(200)["fish"] > 0.9


def test_steps_without_figures_count_as_steps_only() -> None:
    counters = Counters()
    follower = HardnessFollower(mixed(), HardnessConfig(every=2), counters.hardness)
    for step in range(4):
        found = figures((1.0, 1.0), (3.0, 1.0)) if step == 1 else {}
        report = StepReport(learning_rate={}, figures=found, faulty=() if found else ("a",), images=8)
        counters.add(report)
        follower.after(report, counters)
    shares = {"cells": 0.25, "fish": 0.75}
    assert counters.hardness.changes == [(32, pytest.approx(shares)), (48, pytest.approx(shares))]


def test_the_state_is_found_again() -> None:
    counters, one = followed(7, HardnessConfig(every=3))
    assert counters.hardness.sums["cells"][1] == 2
    stored = json.loads(json.dumps(asdict(counters)))
    again = Counters.of(stored, Path("state.json"))
    assert again.hardness == counters.hardness
    told = mixed()
    HardnessFollower(told, HardnessConfig(every=3), again.hardness)
    assert [told.shares(draw) for draw in range(100)] == [one.shares(draw) for draw in range(100)]
    del stored["hardness"]
    assert Counters.of(stored, Path("state.json")).hardness == HardnessState(), "a state of an older version"


def test_a_run_that_goes_on_with_smaller_steps_never_goes_back() -> None:
    counters, _ = followed(3, HardnessConfig(every=3))
    assert counters.hardness.changes[-1][0] == 48
    follower = HardnessFollower(mixed(start=24), HardnessConfig(every=3), counters.hardness)
    for _ in range(3):
        report = StepReport(learning_rate={}, images=2)
        counters.add(report)
        follower.after(report, counters)
    assert [draw for draw, _ in counters.hardness.changes] == [48, 48]


def test_datasets_of_a_batch() -> None:
    follower = HardnessFollower(mixed(), HardnessConfig(), HardnessState())
    losses, objects = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 3])
    found = follower.figures(losses, objects, ("fish", "fish", "cells"))
    assert {name: float(value) for name, value in found.items()} == figures((4.0, 3.0), (3.0, 1.0))
    found = follower.figures(losses, objects, ("fish", "fish", "fish"))
    assert {name: float(value) for name, value in found.items()} == figures((0.0, 0.0), (7.0, 4.0))


def test_more_is_read_ahead_than_a_period(tmp_path: Path) -> None:
    config = LoaderConfig(mixture="hardness", hardness=HardnessConfig(every=5), workers=1, prefetch=6)
    with pytest.raises(ConfigError, match=r"workers read 6 batches ahead, more than 5 steps\n.*set it to 6 or more"):
        build_train_loader(make_datasets(tmp_path), config)
    assert build_train_loader(make_datasets(tmp_path), config.model_copy(update={"prefetch": 5})).hardness is not None
    assert build_train_loader(make_datasets(tmp_path), LoaderConfig(workers=0)).hardness is None


# a training run

SCHEDULE = {"log_every": 2, "evaluate_every": 4, "checkpoint_every": 0}
TIMES = {"seconds", "images_per_second", "waiting_share", "memory_gib", "evaluation_seconds"}


def run(folder: Path, name: str, *, stop: int | None = None, workers: int = 0, accumulation: int = 1) -> Trainer:
    hardness = HardnessConfig(base="equal", every=2, power=3.0)
    loader = LoaderConfig(
        batch_size=2, workers=workers, prefetch=1, mixture="hardness", hardness=hardness, repeat_threshold=0.9
    )
    parts = replace(make_parts(folder), loader=partial(build_train_loader, make_datasets(folder), loader))
    config = make_config(9, loop=SCHEDULE | {"accumulation": accumulation})
    trainer = Trainer(parts, config, folder / name, evaluate=lambda network: {"AP": 1.0})

    def interrupt(module: object, inputs: object) -> None:
        if trainer.counters.step + 1 == stop and not trainer._stop_signals.requested:
            signal.raise_signal(signal.SIGINT)

    trainer.plain_network.register_forward_pre_hook(interrupt)
    trainer.fit(resume=True)
    return trainer


def everything(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], Any]:
    records = [{key: value for key, value in one.items() if key not in TIMES} for one in read_metrics(folder)]
    state = json.loads((folder / "state" / "state.json").read_text())
    return load_file(folder / "state" / "network.safetensors"), records, state["hardness"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps that nothing interrupts."""
    return run(tmp_path_factory.mktemp("hardness"), "whole").folder.path


def assert_same(first: Path, second: Path) -> None:
    (weights, records, state), (others, other_records, other_state) = everything(first), everything(second)
    assert records == other_records
    assert state == other_state
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.trains
def test_a_run_follows_its_losses_and_tells(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, records, state = everything(whole)
    assert [draw for draw, _ in state["changes"]] == [8, 12, 16, 20]
    lines = {one["step"]: one for one in records if one["kind"] == "train"}
    assert all(set(one["box_loss"]) <= {"cells", "fish"} and one["box_loss"] for one in lines.values())
    assert not any(name.startswith("hardness") for one in lines.values() for name in one["losses"])
    assert lines[2]["shares"] == {"cells": 0.5, "fish": 0.5}
    assert lines[4]["shares"] == state["changes"][0][1]
    assert lines[8]["shares"] == state["changes"][2][1]
    # the shares are those of the losses that were logged
    config = HardnessConfig(base="equal", power=3.0)
    expected = hardness_weights({"cells": 0.5, "fish": 0.5}, lines[2]["box_loss"], config)
    assert state["changes"][0][1] == pytest.approx(expected)
    assert state["changes"][0][1] != state["changes"][1][1]


@pytest.mark.trains
@pytest.mark.parametrize("stops", [[3], [2, 7]], ids=["inside a period", "at borders"])
def test_resumed_equals_uninterrupted(tmp_path: Path, whole: Path, stops: list[int]) -> None:
    for stop in stops:
        assert run(tmp_path, "parts", stop=stop).counters.step == stop
    run(tmp_path, "parts")
    assert_same(whole, tmp_path / "parts")


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, "parts", stop=5, workers=2)
    run(tmp_path, "parts", workers=1)
    assert_same(whole, tmp_path / "parts")


def test_how_often_each_dataset_was_seen_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(
        make_parts(tmp_path), make_config(3, loop=SCHEDULE), tmp_path / "run", evaluate=lambda network: {"AP": 1.0}
    )
    with caplog.at_level(logging.INFO):
        trainer.fit()
    (evaluation,) = (one for one in read_metrics(tmp_path / "run") if one["kind"] == "evaluation")
    epochs = evaluation["epochs"]
    assert sum(epochs.values()) * 5 == pytest.approx(6), "five images in each dataset"
    told = f"seen: cells {epochs['cells']:.1f} times, fish {epochs['fish']:.1f} times"
    assert caplog.messages.count(told) == 1
    assert load_checkpoint(tmp_path / "run").training["epochs"] == pytest.approx(epochs, abs=1e-3)
    assert "shares" not in read_metrics(tmp_path / "run")[0]
    config = make_config(5, loop=SCHEDULE | {"evaluate_every": 0})
    with caplog.at_level(logging.INFO):
        Trainer(make_parts(tmp_path), config, tmp_path / "run").fit(resume=True)
    assert caplog.messages[-1].startswith("seen: cells "), "at the end, where nothing is evaluated"
