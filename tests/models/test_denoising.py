"""Denoising: how far boxes move, what flipped copies claim, who hears whom."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, paired_iou, pairwise_coverage
from metr.errors import ConfigError
from metr.models.config import DenoisingConfig
from metr.models.denoising import Denoising
from metr.structures import Categories, Targets

from small import targets_of

WORDS, WIDTH = 8, 6


def categories_of(*kept: Sequence[int], slots: int = 5) -> Categories:
    """Categories that keep these ids in each image; further slots are empty."""
    rows = torch.tensor([[*ids, *[0] * (slots - len(ids))] for ids in kept])
    valid = torch.tensor([[slot < len(ids) for slot in range(slots)] for ids in kept])
    return Categories(
        presence_logits=torch.randn(1, len(kept), WORDS),
        text=torch.randn(WORDS, WIDTH),
        tokens=torch.randn(len(kept), WORDS, WIDTH),
        ids=rows,
        valid=valid,
    )


class Copy(NamedTuple):
    """One valid denoising query."""

    box: Tensor
    label: int
    group: int
    target: int
    positive: bool
    flipped: bool


def copies(targets: Targets, categories: Categories, **values: Any) -> list[list[Copy]]:
    """The valid queries of every image, and checks of what every plan promises."""
    config = DenoisingConfig(**{"number": 60, "groups": 5} | values)
    module = Denoising(WIDTH, config)
    queries, plan = module(targets, categories)
    assert torch.equal(queries.slot, plan.slot)
    assert torch.equal(queries.valid, plan.valid)
    assert (queries.group[~queries.valid] == -1).all()
    assert ((queries.reference_boxes >= 0) & (queries.reference_boxes <= 1)).all()
    assert not queries.reference_boxes.requires_grad
    label = categories.ids.gather(1, plan.slot)
    token = categories.tokens.gather(1, label.unsqueeze(-1).expand(-1, -1, WIDTH))
    torch.testing.assert_close(queries.content, token + module.learned)
    images = []
    for image in range(len(targets.labels)):
        found = []
        for n in plan.valid[image].nonzero().flatten().tolist():
            own = int(targets.labels[image, plan.target[image, n]])
            copy = Copy(
                box=queries.reference_boxes[image, n],
                label=int(label[image, n]),
                group=int(queries.group[image, n]),
                target=int(plan.target[image, n]),
                positive=bool(plan.positive[image, n]),
                flipped=int(label[image, n]) != own,
            )
            assert categories.valid[image, plan.slot[image, n]]
            assert not (copy.flipped and copy.positive)
            found.append(copy)
        assert len(found) <= config.number
        if {*targets.labels[image].tolist()} - {-1} <= {*categories.ids[image][categories.valid[image]].tolist()}:
            assert sum(copy.positive for copy in found) == int(module.positives(targets)[image])
        images.append(found)
    return images


def moves(copy: Copy, target: Targets) -> Tensor:
    """How far each corner moved, in half sizes of the box: the smaller of both ways to pair corners."""
    box = target.boxes[0, copy.target]
    half = (box[2:] / 2).repeat(2)
    before, after = cxcywh_to_xyxy(box), cxcywh_to_xyxy(copy.box)
    swapped = after.view(2, 2).flip(0).flatten()
    plain, crossed = ((corner - before).abs() / half for corner in (after, swapped))
    # along each axis the corners may have changed places
    keep = plain.view(2, 2).amax(0) <= crossed.view(2, 2).amax(0)
    return torch.where(keep.repeat(2), plain, crossed)


def middle(labels: Sequence[int], **values: Any) -> Targets:
    """Objects far from the border, side by side."""
    boxes = [[0.3 + 0.1 * n, 0.5, 0.06, 0.1] for n in range(len(labels))]
    return targets_of(boxes, labels, words=WORDS, **values)


@pytest.mark.parametrize(("noise", "flip"), [(1.0, 0.2), (0.4, 1.0), (0.5, 1.6)])
def test_positives_move_at_most_the_noise_and_flipped_copies_their_share_of_it(noise: float, flip: float) -> None:
    target, categories = middle([0, 1, 2, 3]), categories_of(range(5))
    positive, flipped = [], []
    for _ in range(20):
        for copy in copies(target, categories, box_noise=noise, flip_noise=flip, number=200)[0]:
            if copy.positive:
                positive.append(moves(copy, target))
            elif copy.flipped:
                flipped.append(moves(copy, target))
    for found, limit in ((torch.stack(positive), noise), (torch.stack(flipped), flip * noise)):
        assert found.max() <= limit + 1e-4
        # the whole range is used, on all four sides
        assert (found.amax(0) > 0.95 * limit).all()
        assert (found.amin(0) < 0.05 * limit).all()
        torch.testing.assert_close(found.mean(), torch.tensor(limit / 2), atol=0.05 * limit, rtol=0)


def test_with_a_flip_noise_of_one_the_box_tells_nothing_of_the_answer() -> None:
    """The shifts of positives and of flipped copies have one distribution, which 0.2 keeps apart."""

    def quantiles(flip: float) -> tuple[Tensor, Tensor]:
        found = [copy for _ in range(20) for copy in copies(target, categories, flip_noise=flip, number=200)[0]]
        both = [[moves(c, target) for c in found if kind(c)] for kind in (lambda c: c.positive, lambda c: c.flipped)]
        first, second = (torch.stack(each).quantile(torch.linspace(0.1, 0.9, 5), dim=0) for each in both)
        return first, second

    target, categories = middle([0, 1, 2, 3]), categories_of(range(5))
    positive, flipped = quantiles(1.0)
    torch.testing.assert_close(positive, flipped, atol=0.08, rtol=0)
    positive, flipped = quantiles(0.2)
    assert (positive[-1] > 3 * flipped[-1]).all()


@pytest.mark.parametrize("noise", [1.0, 0.4])
def test_negatives_move_one_to_two_times_the_noise(noise: float) -> None:
    """Seen from the object every corner lies at a distance that a positive's cannot have."""
    target, categories = middle([0, 1, 2, 3]), categories_of(range(5))
    found = []
    for _ in range(20):
        queries = copies(target, categories, box_noise=noise, number=200, flips=False)[0]
        found += [(copy, target.boxes[0, copy.target]) for copy in queries if not copy.positive]
    distances = []
    for copy, box in found:
        half = box[2:] / 2
        sides = cxcywh_to_xyxy(copy.box).view(2, 2)
        for axis in range(2):
            low, high = box[axis] - half[axis], box[axis] + half[axis]
            first, second = sides[0, axis], sides[1, axis]
            ways = [torch.stack([first - low, second - high]), torch.stack([second - low, first - high])]
            ways = [way.abs() / (half[axis] * noise) for way in ways]
            fits = [way for way in ways if (way >= 1 - 1e-4).all() and (way <= 2 + 1e-4).all()]
            assert fits, (copy, box)
            distances.append(fits[0])
    spread = torch.stack(distances)
    assert spread.amin() < 1.05
    assert spread.amax() > 1.95


def test_directions_are_random() -> None:
    target, categories = middle([0]), categories_of(range(5))
    centre = target.boxes[0, 0, :2]
    offsets = [
        copy.box[:2] - centre
        for _ in range(60)
        for copy in copies(target, categories, number=15, flips=False)[0]
        if copy.positive
    ]
    signs = (torch.stack(offsets) > 0).float().mean(0)
    assert ((signs > 0.3) & (signs < 0.7)).all()


def test_boxes_stay_in_the_image() -> None:
    corner = targets_of([[0.02, 0.98, 0.04, 0.04], [0.5, 0.5, 1.0, 1.0]], [0, 1], words=WORDS)
    for _ in range(20):
        for copy in copies(corner, categories_of(range(5)))[0]:
            corners = cxcywh_to_xyxy(copy.box)
            assert corners.min() >= -1e-6
            assert corners.max() <= 1 + 1e-6
            assert (corners[2:] >= corners[:2]).all()


def test_noise_of_nothing_is_refused() -> None:
    """The right box would have to answer "yes" and "no"."""
    with pytest.raises(ValidationError, match="box_noise"):
        DenoisingConfig(box_noise=0)


# What is shown


def test_every_object_is_shown_moved_too_far_and_flipped() -> None:
    target = middle([0, 1, 1])
    found = copies(target, categories_of(range(5)), number=60, groups=5)[0]
    assert len(found) == 45
    for index in range(3):
        shown = [copy for copy in found if copy.target == index]
        assert len(shown) == 15
        assert sum(copy.positive for copy in shown) == 5
        assert sum(copy.flipped for copy in shown) == 5
    plain = copies(target, categories_of(range(5)), number=60, groups=5, flips=False)[0]
    assert len(plain) == 30
    assert not any(copy.flipped for copy in plain)


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("number", [3, 5, 6, 7, 20, 61])
@pytest.mark.parametrize("objects", [1, 2, 5])
def test_the_number_is_a_limit(number: int, objects: int, flips: bool) -> None:
    kinds = 3 if flips else 2
    target = middle([n % 4 for n in range(objects)])
    found = copies(target, categories_of(range(5)), number=number, groups=3, flips=flips)[0]
    shown = min(objects, number // kinds)
    versions = min(3, max(1, number // (kinds * shown))) if shown else 0
    assert len(found) == kinds * shown * versions
    assert len({copy.target for copy in found}) == shown


def test_a_number_that_holds_no_object_is_refused() -> None:
    for number, flips in ((1, False), (2, True)):
        with pytest.raises(ConfigError, match=f"number {number} holds no object"):
            DenoisingConfig.checked({"number": number, "flips": flips})
    assert DenoisingConfig(number=0).number == 0


def test_more_objects_than_room_are_drawn_by_lot() -> None:
    target, categories = middle([0, 1, 2, 3, 0]), categories_of(range(5))
    drawn = [{copy.target for copy in copies(target, categories, number=6)[0]} for _ in range(40)]
    assert all(len(lot) == 2 for lot in drawn)
    assert set().union(*drawn) == {0, 1, 2, 3, 4}


def test_images_without_objects_say_nothing() -> None:
    empty = targets_of([], [], words=WORDS)
    categories = categories_of(range(5), range(5), [])
    found = copies(Targets.stack([empty, middle([2]), empty]), categories)
    assert [len(image) for image in found] == [0, 15, 0]
    # with no object anywhere one invalid query is left, so that the module takes part
    module = Denoising(WIDTH, DenoisingConfig())
    queries, plan = module(Targets.stack([empty, empty]), categories_of(range(5), []))
    assert queries.content.shape == (2, 1, WIDTH)
    assert not plan.valid.any()
    queries.content.sum().backward()
    assert module.learned.grad is not None


def test_objects_without_a_slot_are_not_shown() -> None:
    target = middle([0, 6, 1])
    found = copies(target, categories_of([0, 1, 2]))[0]
    assert {copy.target for copy in found} == {0, 2}
    # id 0 of an empty slot is not category 0
    assert {copy.target for copy in copies(target, categories_of([1, 2]))[0]} == {2}


# Flipped copies


def flipped_labels(target: Targets, categories: Categories, index: int = 0, rounds: int = 40) -> set[int]:
    """The categories that an object's flipped copies claimed."""
    found = set()
    for _ in range(rounds):
        found |= {c.label for c in copies(target, categories)[0] if c.flipped and c.target == index}
    return found


def test_flipped_copies_claim_every_other_annotated_kept_category() -> None:
    target = middle([0], annotated=[0, 1, 2, 3])
    assert flipped_labels(target, categories_of([0, 1, 3, 4])) == {1, 3}
    assert flipped_labels(middle([0]), categories_of(range(5))) == {1, 2, 3, 4}


def test_flipped_copies_never_claim_a_category_that_is_there() -> None:
    box = [0.5, 0.5, 0.2, 0.2]
    near, far = [0.52, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]
    target = targets_of([box, near, far], [0, 1, 2], words=WORDS)
    assert flipped_labels(target, categories_of(range(5))) == {2, 3, 4}
    assert flipped_labels(target, categories_of(range(5)), index=1) == {2, 3, 4}
    assert flipped_labels(target, categories_of(range(5)), index=2) == {0, 1, 3, 4}


def test_a_flipped_copy_that_moves_to_an_object_of_its_category_is_left_out() -> None:
    """Against boxes one by one: neighbours with so much noise that copies of one reach the other, and a crowd."""
    row = targets_of([[0.3 + 0.1 * n, 0.5, 0.1, 0.1] for n in range(3)], [0, 1, 2], words=WORDS)
    target = replace(row, ignore_boxes=torch.tensor([[[0.4, 0.7, 0.4, 0.2]]]), ignore_labels=torch.tensor([[3]]))
    places = [*zip(target.boxes[0], target.labels[0].tolist(), strict=True)]
    claimed = set()
    for _ in range(20):
        found = copies(target, categories_of(range(5)), flip_noise=1.0, number=45)[0]
        for copy in (copy for copy in found if copy.flipped):
            corners = cxcywh_to_xyxy(copy.box)
            for box, label in places:
                assert label != copy.label or paired_iou(corners, cxcywh_to_xyxy(box)) <= 0.3
            crowd = pairwise_coverage(corners[None], cxcywh_to_xyxy(target.ignore_boxes[0]))
            assert copy.label != 3 or crowd <= 0.3
            claimed.add((copy.target, copy.label))
        assert sum(copy.positive for copy in found) == 15, "positives stay where they are"
    assert claimed >= {(0, 1), (1, 0), (0, 3), (0, 4)}, "those that stay clear are there"


def test_flipped_copies_never_claim_the_category_of_a_crowd_there() -> None:
    target = targets_of([[0.5, 0.5, 0.1, 0.1]], [0], words=WORDS)
    around = torch.tensor([[0.5, 0.5, 0.8, 0.8], [0.9, 0.9, 0.1, 0.1]])
    crowded = replace(target, ignore_boxes=around.unsqueeze(0), ignore_labels=torch.tensor([[3, 4]]))
    assert flipped_labels(crowded, categories_of(range(5))) == {1, 2, 4}


def test_a_flipped_copy_of_an_object_without_area_does_not_claim_its_own_category() -> None:
    """Its overlap with itself is no number to rely on."""
    line = targets_of([[0.5, 0.5, 0.0, 0.2]], [0], words=WORDS)
    module = Denoising(WIDTH, DenoisingConfig(number=15))
    flips = torch.arange(15) % 3 == 2
    for _ in range(20):
        plan = module(line, categories_of([0, 1]))[1]
        assert plan.slot[0, flips].tolist() == [1] * 5
    alone = module(line, categories_of([0]))[1]
    assert int(alone.valid.sum()) == 10


def test_where_nothing_is_free_there_is_no_flipped_copy() -> None:
    target = middle([0], annotated=[0])
    found = copies(target, categories_of([0, 1]))[0]
    assert len(found) == 10
    assert not any(copy.flipped for copy in found)


# Groups


def test_groups_are_one_round_of_one_category_and_never_the_matching_ones() -> None:
    target, categories = middle([0, 1, 1]), categories_of(range(5))
    found = copies(target, categories)[0]
    by_group: dict[int, list[Copy]] = {}
    for copy in found:
        by_group.setdefault(copy.group, []).append(copy)
    assert min(by_group) >= categories.ids.shape[1]
    for members in by_group.values():
        assert len({copy.label for copy in members}) == 1
        positives = [copy.target for copy in members if copy.positive]
        assert len(positives) == len(set(positives)), "each object is shown once a round"
        assert sorted(positives) == sorted(c.target for c in members if not c.positive and not c.flipped)
    shown = [(copy.target, copy.group) for copy in found if copy.positive]
    assert len(set(shown)) == len(shown) == 15


def test_the_same_seed_gives_the_same_queries() -> None:
    target, categories = middle([0, 1, 1]), categories_of(range(5))
    module = Denoising(WIDTH, DenoisingConfig())
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(module(target, categories)[0].reference_boxes)
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], module(target, categories)[0].reference_boxes)
