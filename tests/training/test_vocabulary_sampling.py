"""Which names a step asks for, and what becomes of its targets."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.structures import NO_OBJECT, Targets
from metr.training.step_targets import narrowed, sample_vocabulary
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

from small import small_config, small_detector, targets_of

WORDS = 60
BOX = [0.5, 0.5, 0.3, 0.3]
# three images of one dataset with 40 names, one of another with 5
LARGE, SMALL = range(40), range(50, 55)
IMAGES = (
    targets_of([BOX, BOX], [3, 7], words=WORDS, annotated=LARGE),
    targets_of([BOX], [7], words=WORDS, annotated=LARGE),
    targets_of([], [], words=WORDS, annotated=LARGE),
    targets_of([BOX], [51], words=WORDS, annotated=SMALL),
)
TARGETS = Targets.stack(IMAGES)
PRESENT = {3, 7, 51}


def chosen(limit: int, targets: Targets = TARGETS, seed: int = 0) -> list[int]:
    rows = sample_vocabulary(targets, limit, torch.Generator().manual_seed(seed)).tolist()
    assert rows == sorted({*rows})
    return rows


@pytest.mark.parametrize("limit", [0, WORDS, WORDS + 1])
def test_all_names_and_no_random_number(limit: int) -> None:
    state = torch.random.get_rng_state()
    assert sample_vocabulary(TARGETS, limit).tolist() == list(range(WORDS))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_present_names_come_first_then_annotated_ones() -> None:
    for limit in (3, 8, 20, 45):
        rows = {*chosen(limit)}
        assert len(rows) == limit
        assert PRESENT <= rows <= {*LARGE, *SMALL}
    # all that something is known of, and no more
    assert chosen(59) == [*LARGE, *SMALL]


def test_present_names_are_never_left_out() -> None:
    assert {*chosen(2)} == PRESENT
    assert {*chosen(1)} == PRESENT


def test_every_image_has_its_say() -> None:
    """Of the drawn names, the one image with few names gets as many as each of the others."""
    drawn: Counter[str] = Counter()
    for seed in range(100):
        drawn.update("small" if row in SMALL else "large" for row in chosen(3 + 8, seed=seed) if row not in PRESENT)
    # 8 a step in rounds of four images; two images may name the same, so it is a little more than two
    assert 180 <= drawn["small"] <= 260
    # and within a dataset nobody is preferred
    counts = Counter(
        row for seed in range(200) for row in chosen(3 + 8, seed=seed) if row in LARGE and row not in PRESENT
    )
    assert len(counts) == 38
    assert max(counts.values()) < 4 * min(counts.values())


def test_assumed_negative_names_fill_what_room_is_left() -> None:
    assumed = torch.zeros(1, WORDS, dtype=torch.bool)
    assumed[0, 40:50] = True
    targets = Targets.stack([replace(IMAGES[0], assumed_negative=assumed), *IMAGES[1:]])
    assert not {*chosen(45, targets)} & {*range(40, 50)}
    rows = {*chosen(49, targets)}
    assert {*LARGE, *SMALL} <= rows
    assert len(rows) == 49
    assert {*chosen(58, targets)} == {*LARGE, *SMALL, *range(40, 50)}


def test_names_of_which_only_ignored_boxes_are_there_are_not_drawn() -> None:
    target = replace(
        targets_of([BOX], [1], words=4, annotated=[0, 1, 2]),
        ignore_boxes=torch.tensor([[BOX]]),
        ignore_labels=torch.tensor([[2]]),
    )
    assert chosen(3, target) == [0, 1]


def test_at_least_one_name() -> None:
    assert len(chosen(2, targets_of([], [], words=4, annotated=[]))) == 1


def test_the_seed_decides() -> None:
    assert chosen(20, seed=1) == chosen(20, seed=1)
    assert len({tuple(chosen(20, seed=seed)) for seed in range(5)}) == 5


def test_narrowed_targets_mean_the_same() -> None:
    target = replace(
        IMAGES[0],
        ignore_boxes=torch.rand(1, 2, 4),
        ignore_labels=torch.tensor([[7, 9]]),
        assumed_negative=torch.arange(WORDS).unsqueeze(0) >= 40,
    )
    rows = torch.tensor([0, 3, 7, 45])
    narrow = narrowed(target, rows)
    assert rows[narrow.labels].tolist() == target.labels.tolist()
    assert torch.equal(narrow.boxes, target.boxes)
    assert narrow.annotated.tolist() == [[True, True, True, False]]
    assert narrow.assumed_negative.tolist() == [[False, False, False, True]]
    assert narrow.ignore_labels.tolist() == [[2, NO_OBJECT]]
    assert torch.equal(narrow.ignore_boxes[:, 0], target.ignore_boxes[:, 0])
    # what concerns other rows is left out, and so is padding
    assert not narrowed(target, torch.tensor([0, 1])).is_object.any()
    last = narrowed(TARGETS, torch.tensor([51, WORDS - 1]))
    assert last.labels[last.is_object].tolist() == [0]


@pytest.mark.trains
def test_losses_are_those_of_all_names_where_the_others_are_unknown() -> None:
    """Asking for some names is the same as not knowing anything of the others."""
    detector = small_detector(small_config(denoising=0)).train()
    text = torch.nn.functional.normalize(torch.randn(12, 24), dim=-1)
    images, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    rows = torch.tensor([1, 4, 5, 8, 9])
    targets = Targets.stack(
        [
            targets_of([BOX, [0.2, 0.3, 0.2, 0.2]], [4, 8], words=12, annotated=rows.tolist()),
            targets_of([BOX], [9], words=12, annotated=[5, 9]),
        ]
    )
    criterion = SetCriterion(CriterionConfig())
    with torch.no_grad():
        everything, _ = criterion(detector(images, mask, text, targets), targets)
        few = narrowed(targets, rows)
        some, _ = criterion(detector(images, mask, text[rows], few), few)
    for name, term in everything.items():
        torch.testing.assert_close(some.terms[name], term, atol=1e-4, rtol=1e-4)


def test_names_that_were_left_out_get_no_gradient(tmp_path: Path) -> None:
    trainer = Trainer(make_parts(tmp_path), make_config(loop={"vocabulary_sample": 2}), tmp_path / "run")
    text = trainer.step_targets.text = trainer.step_targets.text.clone().requires_grad_()
    batch = next(iter(trainer.parts.loader(seed=0, start=0, rank=0, world=1, device=trainer.device)))
    sampled, targets = trainer.step_targets(batch, None, 8)
    assert len(sampled) < len(text)
    losses, _ = trainer._losses(batch, (sampled, targets), None)
    losses.total.backward()
    gradient: Tensor | None = text.grad
    assert gradient is not None
    assert torch.equal(text[gradient.abs().sum(1) > 0], sampled)


@pytest.mark.trains
def test_a_limit_that_leaves_nothing_out_trains_as_without_one(tmp_path: Path) -> None:
    states = []
    for names in (0, 4, 100):
        torch.manual_seed(0)
        parts = make_parts(tmp_path)
        trainer = Trainer(parts, make_config(2, loop={"vocabulary_sample": names}), tmp_path / f"run{names}")
        trainer.fit()
        states.append(copy.deepcopy(parts.network.state_dict()))
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_training_with_few_names_is_the_same_again(tmp_path: Path) -> None:
    states = []
    for name in ("first", "second"):
        parts = make_parts(tmp_path)
        Trainer(parts, make_config(3, loop={"vocabulary_sample": 2}), tmp_path / name).fit()
        states.append(parts.network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
