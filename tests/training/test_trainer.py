"""Training end to end on a small run: what is learnt, written, skipped, refused."""

import copy
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from metr.checkpoint import load_checkpoint
from metr.config import read_yaml
from metr.errors import CheckpointError, MetrError
from metr.losses.config import CriterionConfig
from metr.losses.criterion import LossCounts, SetCriterion
from metr.structures import DetectorOutput, Losses, Matches, Targets
from metr.training.config import RunConfig, TrainConfig
from metr.training.logger import read_metrics
from metr.training.parts import Evaluated
from metr.training.state import optimizer_tensors
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

from small import SEED


class Rising:
    """An evaluation whose AP is its own count, and which remembers the weights it was shown."""

    def __init__(self, values: Sequence[float | None] = ()) -> None:
        self.values, self.networks, self.training = list(values), [], []

    def __call__(self, network: nn.Module) -> Evaluated:
        torch.rand(5)  # must not disturb training
        self.networks.append({key: value.clone() for key, value in network.state_dict().items()})
        self.training.append(network.training or torch.is_grad_enabled())
        count = len(self.networks)
        metrics = {"AP": self.values[count - 1] if self.values else float(count), "none": None}
        return Evaluated(metrics=metrics, calibration={"shark": (1.0, count / 10)})


class Sick(SetCriterion):
    """Loses one term to NaN in the batches (from 0 on) that it is told."""

    def __init__(self, *calls: int) -> None:
        super().__init__(CriterionConfig())
        self.sick, self.calls = calls, 0

    def forward(
        self, output: DetectorOutput, targets: Targets, counts: LossCounts | None = None
    ) -> tuple[Losses, Matches]:
        losses, matches = super().forward(output, targets, counts)
        self.calls += 1
        if self.calls - 1 not in self.sick:
            return losses, matches
        return Losses(terms={**losses.terms, "decoder.1/l1": losses.terms["decoder.1/l1"] * math.nan}), matches


def states_equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.trains
def test_it_learns(tmp_path: Path) -> None:
    loop = {"log_every": 12, "seed": SEED}
    config = make_config(48, ema={"enabled": False}, loop=loop, optimizer={"learning_rate": 3e-3})
    Trainer(make_parts(tmp_path), config, tmp_path / "run").fit()
    totals = [record["total"] for record in read_metrics(tmp_path / "run")]
    assert len(totals) == 4
    assert totals[-1] < 0.9 * totals[0]


@pytest.mark.trains
def test_a_step_is_what_it_says(tmp_path: Path) -> None:
    """Against the same step by hand: gradient of two batches together, clipped, AdamW at the scheduled rate."""
    changes = {"optimizer": {"clip_norm": 0.5, "weight_decay": 0.1}, "loop": {"accumulation": 2}}
    config = make_config(10, **changes)
    parts = make_parts(tmp_path)
    trainer = Trainer(parts, config, tmp_path / "run")
    network = copy.deepcopy(trainer.plain_network).train()
    stream = iter(parts.loader(seed=0, start=0, rank=0, world=1, device=torch.device("cpu")))
    batches = [next(stream), next(stream)]

    trainer.network.train()
    torch.manual_seed(1)
    report = trainer.train_step(batches).read()

    torch.manual_seed(1)
    decayed = [p for n, p in network.named_parameters() if p.requires_grad and p.ndim > 1 and n.endswith("weight")]
    names = {id(parameter) for parameter in decayed}
    plain = [p for p in network.parameters() if p.requires_grad and id(p) not in names]
    rates = {id(p): 1e-4 if n.startswith("backbone.") else 1e-3 for n, p in network.named_parameters()}
    groups = [
        {"params": [parameter], "lr": 0.5 * rates[id(parameter)], "weight_decay": decay}
        for members, decay in ((decayed, 0.1), (plain, 0.0))
        for parameter in members
    ]
    optimizer = torch.optim.AdamW(groups, fused=False, foreach=False)
    total = torch.zeros(())
    asked = [trainer.step_targets(batch, None, first) for first, batch in zip((0, 2), batches, strict=True)]
    outputs = [network(batch.images, batch.padding_mask, *wanted) for batch, wanted in zip(batches, asked, strict=True)]
    counts = LossCounts(
        objects=torch.stack([targets.is_object.sum() for _, targets in asked]).sum() / 2,
        noised_objects=torch.stack([output.denoising.plan.positive.sum() for output in outputs]).sum() / 2,
    )
    for output, (_, targets) in zip(outputs, asked, strict=True):
        total = total + trainer.criterion(output, targets, counts)[0].total / 2
    total.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in network.parameters() if p.grad is not None))
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5 / norm)
    optimizer.step()

    assert norm > 0.5
    assert report.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    terms = {name: value for name, value in report.figures.items() if not name.startswith("matching/")}
    assert sum(terms.values()) == pytest.approx(total.item(), rel=1e-4)
    assert report.learning_rate == {"backbone": pytest.approx(5e-5), "rest": pytest.approx(5e-4)}
    for (name, ours), theirs in zip(trainer.plain_network.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_two_batches_have_the_gradient_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has three times the objects of the other: their losses are divided by all objects, not twice by some."""
    parts = make_parts(tmp_path, one_to_many={"number": 6, "repeats": 2}, varied=(2, 10))
    trainer = Trainer(parts, make_config(10, ema={"enabled": False}), tmp_path / "run")
    trainer.network.train()
    stream = iter(parts.loader(seed=0, start=0, rank=0, world=1, device=torch.device("cpu")))
    halves = [next(stream), next(stream)]
    crowd = halves[0].targets
    crowd = replace(crowd, boxes=crowd.boxes.repeat(1, 3, 1) * 0.9, labels=crowd.labels.repeat(1, 3))
    halves[0] = replace(halves[0], targets=crowd)
    first, second = (half.targets.is_object.sum() for half in halves)
    assert first > second > 0
    whole = replace(
        halves[0],
        targets=Targets.stack([half.targets for half in halves]),
        **{name: torch.cat([getattr(half, name) for half in halves]) for name in ("images", "padding_mask")},
        **{name: halves[0].__dict__[name] + halves[1].__dict__[name] for name in ("image_ids", "datasets", "sizes")},
    )
    gradients: list[list[torch.Tensor]] = []

    def recorded(optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
        gradients.append([p.grad.clone() for p in trainer.plain_network.parameters() if p.grad is not None])
        return torch.tensor(math.nan)  # so that the step changes nothing

    monkeypatch.setattr(trainer.engine, "clip_gradient", recorded)
    for batches in (halves, [whole]):
        trainer.train_step(batches)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0.1


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    evaluate, config = (
        Rising(),
        make_config(6, loop={"log_every": 2, "evaluate_every": 3, "curves": True, "images": True}),
    )
    outcome = Trainer(make_parts(tmp_path), config, tmp_path / "run", evaluate=evaluate).fit()
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "best", "config.yaml", "curves.png", "last", "metrics.jsonl", "state", "train_batch.jpg",
    ]  # fmt: skip
    assert TrainConfig.checked(read_yaml(run / "config.yaml")) == config
    assert (outcome.step, outcome.interrupted, outcome.best, outcome.best_step) == (6, False, 2.0, 6)
    assert outcome.metrics == {"AP": 2.0}
    assert not any(evaluate.training)

    records = read_metrics(run)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 2), ("evaluation", 3), ("train", 4), ("train", 6), ("evaluation", 6),
    ]  # fmt: skip
    last = records[3]
    assert last["images"] == 12
    assert last["total"] == pytest.approx(sum(last["losses"].values()))
    assert set(last["learning_rate"]) == {"backbone", "rest"}
    assert set(last["matching"]) == {"iou", "objects", "without_slot", "crowded_out"}
    assert last["epochs"].keys() == {"cells", "fish"}
    assert sum(last["epochs"].values()) * 5 == pytest.approx(12)
    assert all(last[key] > 0 for key in ("seconds", "images_per_second", "memory_gib", "gradient_norm"))
    assert 0 <= last["waiting_fraction"] <= 1

    best = load_checkpoint(run)
    assert states_equal(best.weights, evaluate.networks[1]), "the average is evaluated, and saved"
    # twelve draws of two datasets of five images
    epochs = {"cells": 1.0, "fish": 1.4}
    assert best.training == {"step": 6, "images": 12, "epochs": epochs, "metrics": {"AP": 2.0}}
    assert best.detection.calibration == {"shark": (1.0, 0.2)}


def test_the_best_stays_the_best(tmp_path: Path) -> None:
    evaluate = Rising([1.0, 5.0, float("nan"), 4.0, None])
    config = make_config(5, loop={"evaluate_every": 1})
    outcome = Trainer(make_parts(tmp_path), config, tmp_path / "run", evaluate=evaluate).fit()
    assert (outcome.best, outcome.best_step) == (5.0, 2)
    assert states_equal(load_checkpoint(tmp_path / "run" / "best").weights, evaluate.networks[1])
    assert states_equal(load_checkpoint(tmp_path / "run" / "last").weights, evaluate.networks[4])


def test_without_an_average_the_network_itself_is_evaluated(tmp_path: Path) -> None:
    evaluate, config = Rising(), make_config(2, ema={"enabled": False})
    trainer = Trainer(make_parts(tmp_path), config, tmp_path / "run", evaluate=evaluate)
    trainer.fit()
    assert states_equal(load_checkpoint(tmp_path / "run").weights, trainer.plain_network.state_dict())
    assert states_equal(evaluate.networks[0], trainer.plain_network.state_dict())
    assert trainer.plain_network.training


@pytest.mark.trains
def test_evaluations_do_not_disturb_training(tmp_path: Path) -> None:
    results = []
    for name, every in (("seldom", 0), ("often", 1)):
        config = make_config(3, loop={"evaluate_every": every})
        trainer = Trainer(make_parts(tmp_path), config, tmp_path / name, evaluate=Rising())
        trainer.fit()
        results.append(trainer.plain_network.state_dict())
    assert states_equal(*results)


def test_an_evaluation_that_fails_costs_no_training(tmp_path: Path) -> None:
    def fail(network: nn.Module) -> Evaluated:
        raise MemoryError

    config = make_config(4, loop={"evaluate_every": 2})
    with pytest.raises(MemoryError):
        Trainer(make_parts(tmp_path), config, tmp_path / "run", evaluate=fail).fit()
    assert load_checkpoint(tmp_path / "run").training["step"] == 2
    trainer = Trainer(make_parts(tmp_path), config, tmp_path / "run", evaluate=Rising())
    trainer.fit(resume=True)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["kind"] == "evaluation"] == [2, 4]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        Trainer(make_parts(tmp_path), make_config(1), tmp_path / "file" / "run").fit()


def test_an_unknown_metric_is_said_and_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(2, loop={"best_metric": "Ap"})
    outcome = Trainer(make_parts(tmp_path), config, tmp_path / "run", evaluate=Rising()).fit()
    assert outcome.best is None
    assert "gives no 'Ap'" in caplog.text
    assert "one of 'AP'" in caplog.text
    assert load_checkpoint(tmp_path / "run").training["step"] == 2


@pytest.mark.parametrize("sick", [1, 2])
def test_a_step_without_finite_losses_changes_nothing(
    tmp_path: Path, sick: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With two batches a step, whichever of the two is at issue."""
    parts = make_parts(tmp_path, criterion=Sick(sick), encoder="hybrid")  # which has running statistics
    config = make_config(4, loop={"accumulation": 2, "log_every": 1})
    trainer = Trainer(parts, config, tmp_path / "run")
    stream = iter(parts.loader(seed=0, start=0, rank=0, world=1, device=torch.device("cpu")))
    trainer.network.train()
    trainer.criterion.calls = sick - sick % 2
    before = copy.deepcopy(trainer.plain_network.state_dict())
    report = trainer.train_step([next(stream), next(stream)]).read()
    assert report.faulty == ("decoder.1/l1",)
    assert all(parameter.grad is None for parameter in trainer.plain_network.parameters())
    assert states_equal(before, trainer.plain_network.state_dict())
    state = optimizer_tensors(trainer.plain_network, trainer.optimizer)
    assert not any(value.any() for value in state.values()), "neither moments nor the count of steps"

    trainer.criterion.calls = 0
    outcome = trainer.fit()
    assert outcome.step == 4
    assert (trainer.counters.skipped, trainer.counters.skipped_in_a_row) == (1, 0)
    assert "step 1 is skipped: decoder.1/l1 not finite" in caplog.text or "step 2 is skipped" in caplog.text
    records = read_metrics(tmp_path / "run")
    assert [record["skipped"] for record in records] == ([1, 1, 1, 1] if sick == 1 else [0, 1, 1, 1])
    assert [record["total"] is None for record in records] == [sick == 1, sick == 2, False, False]


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    trainer = Trainer(parts, make_config(2), tmp_path / "run")
    parameter = next(p for p in trainer.plain_network.parameters() if p.requires_grad)
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(dict(trainer.plain_network.named_parameters()))
    trainer.fit()
    handle.remove()
    assert trainer.counters.skipped == 2
    assert states_equal(before, dict(trainer.plain_network.named_parameters()))


def test_it_gives_up_when_nothing_is_finite_any_more(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, criterion=Sick(*range(3, 50)))
    config = make_config(20, loop={"max_skipped": 4, "checkpoint_every": 3})
    trainer = Trainer(parts, config, tmp_path / "run")
    with pytest.raises(MetrError, match=r"step 7: 4 steps in a row .*: decoder.1/l1\n.*learning_rate"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "run").training["step"] == 6, "the checkpoints before stay"


@pytest.mark.trains
def test_bf16_trains_and_keeps_losses_in_float32(tmp_path: Path) -> None:
    config = make_config(2, loop={"precision": "bf16", "log_every": 1})
    trainer = Trainer(make_parts(tmp_path), config, tmp_path / "run")
    seen = []
    trainer.plain_network.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.dtype))
    trainer.fit()
    assert trainer.counters.skipped == 0
    assert {parameter.dtype for parameter in trainer.plain_network.parameters()} == {torch.float32}
    full = Trainer(make_parts(tmp_path), make_config(2, loop={"log_every": 1}), tmp_path / "full")
    begun = {name: value.clone() for name, value in full.plain_network.named_parameters()}
    full.fit()
    half_moved, moved = (
        {name for name, value in one.plain_network.named_parameters() if not torch.equal(value, begun[name])}
        for one in (trainer, full)
    )
    assert half_moved == moved, "no gradient is lost on the way"
    half, whole = (read_metrics(tmp_path / name)[0]["total"] for name in ("run", "full"))
    assert half == pytest.approx(whole, rel=0.1)
    assert half != whole


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    Trainer(make_parts(tmp_path), make_config(1), tmp_path / "run").fit()
    with pytest.raises(MetrError, match="a run is in this folder already\n  try: resume it"):
        Trainer(make_parts(tmp_path), make_config(1), tmp_path / "run").fit()


def test_progress_is_shown_and_the_configuration_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    config, whole = make_config(2), RunConfig(train=make_config(17))
    Trainer(make_parts(tmp_path), config, tmp_path / "run", resolved=whole, console=screen).fit()
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    saved = tmp_path / "run" / "config.yaml"
    assert f"configuration: {saved}" in shown.replace("\n", "")
    assert "step 2 of 2" in shown
    assert "learning_rate" not in shown, "the file has it"
    assert RunConfig.checked(read_yaml(saved)) == whole
    with caplog.at_level(logging.INFO):
        Trainer(make_parts(tmp_path), config, tmp_path / "quiet").fit()
    assert f"configuration: {tmp_path / 'quiet' / 'config.yaml'}" in caplog.text


def test_checkpoints_hold_the_description(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    Trainer(parts, make_config(1), tmp_path / "run").fit()
    loaded = load_checkpoint(tmp_path / "run")
    expected = parts.checkpoint
    assert loaded.vocabulary == expected.vocabulary
    assert torch.equal(loaded.text_embeddings, expected.text_embeddings)
    assert replace(loaded, weights={}, training={}, text_embeddings=expected.text_embeddings) == expected
