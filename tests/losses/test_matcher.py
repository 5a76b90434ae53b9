import logging
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from small_outputs import image_targets, random_boxes, random_output
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, paired_iou
from metr.losses.config import CriterionConfig, MatchingCosts
from metr.losses.criterion import SetCriterion
from metr.losses.matcher import match_groups, match_statistics
from metr.structures import Matches, Targets

CONFIG = CriterionConfig()


def rows(matches: Matches) -> list[tuple[int, ...]]:
    columns = (matches.layer, matches.image, matches.query, matches.target)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def reference_cost(logit: Tensor, box: Tensor, wanted: Tensor, costs: MatchingCosts) -> float:
    """The cost of one pair, number by number."""
    p = 1 / (1 + np.exp(-float(logit)))
    yes, no = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8), 0.75 * p**2 * -np.log(1 - p + 1e-8)
    (ax, ay, aw, ah), (bx, by, bw, bh) = box.double().tolist(), wanted.double().tolist()
    sides = [(ax - aw / 2, ax + aw / 2, bx - bw / 2, bx + bw / 2), (ay - ah / 2, ay + ah / 2, by - bh / 2, by + bh / 2)]
    overlap = float(np.prod([max(0, min(a1, b1) - max(a0, b0)) for a0, a1, b0, b1 in sides]))
    hull = float(np.prod([max(a1, b1) - min(a0, b0) for a0, a1, b0, b1 in sides]))
    union = aw * ah + bw * bh - overlap
    giou = overlap / union - (hull - union) / hull
    l1 = float((box.double() - wanted.double()).abs().sum())
    return costs.classification * (yes - no) + costs.l1 * l1 - costs.giou * giou


def cheapest(cost: list[list[float]]) -> float:
    """The least total of all assignments of the smaller side to the larger, by trying every one."""
    table = np.array(cost) if len(cost) <= len(cost[0]) else np.array(cost).T
    small, large = table.shape
    return min(sum(table[i, j] for i, j in enumerate(chosen)) for chosen in permutations(range(large), small))


@pytest.mark.parametrize("as_images", [True, False], ids=["nine images", "nine categories of one image"])
def test_golden_pairs(shared: Path, as_images: bool) -> None:
    golden = load_file(shared / "golden" / "official_matching.safetensors")
    counts = golden["input/target_counts"]
    group = torch.arange(9).repeat_interleave(counts)
    within = torch.cat([torch.arange(int(count)) for count in counts])
    boxes, logits = golden["input/boxes_cxcywh"], golden["input/logits"]
    if as_images:
        target_boxes, labels = torch.full((9, 8, 4), 0.5), torch.full((9, 8), -1)
        target_boxes[group, within], labels[group, within] = golden["input/target_boxes_cxcywh"], 0
        matches = match_groups(logits[None], boxes[None], torch.zeros(9, 6).long(), target_boxes, labels, CONFIG)
        found = torch.stack([matches.image, matches.query, matches.target])
    else:
        category = torch.arange(9).repeat_interleave(6)[None]
        target_boxes, labels = golden["input/target_boxes_cxcywh"][None], group[None]
        flat_logits, flat_boxes = logits.reshape(1, 1, 54), boxes.reshape(1, 1, 54, 4)
        matches = match_groups(flat_logits, flat_boxes, category, target_boxes, labels, CONFIG)
        found = torch.stack([matches.query // 6, matches.query % 6, within[matches.target]])
    expected = [golden[f"output/match_{name}"] for name in ("group", "query", "target")]
    assert found.tolist() == torch.stack(expected).tolist()
    assert matches.layer.tolist() == [0] * 19


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 3),
    images=st.integers(1, 3),
    queries=st.integers(0, 6),
    objects=st.integers(0, 5),
    names=st.integers(1, 3),
)
def test_equals_brute_force(seed: int, layers: int, images: int, queries: int, objects: int, names: int) -> None:
    torch.manual_seed(seed)
    logits, boxes = 2 * torch.randn(layers, images, queries), random_boxes(layers, images, queries)
    category = torch.randint(-1, names, (images, queries))
    target_boxes, labels = random_boxes(images, objects), torch.randint(-1, names, (images, objects))
    if objects > 1:  # a duplicate
        target_boxes[:, 1], labels[:, 1] = target_boxes[:, 0], labels[:, 0]
    found = rows(match_groups(logits, boxes, category, target_boxes, labels, CONFIG))

    assert found == sorted(found, key=lambda row: (row[0], row[1], int(category[row[1], row[2]]), row[2]))
    expected_count = 0
    for layer in range(layers):
        for image in range(images):
            for name in range(names):
                of_name = (category[image] == name).nonzero().flatten().tolist()
                wanted = (labels[image] == name).nonzero().flatten().tolist()
                if not of_name or not wanted:
                    continue
                cost = {
                    (i, j): reference_cost(
                        logits[layer, image, i], boxes[layer, image, i], target_boxes[image, j], CONFIG.costs
                    )
                    for i in of_name
                    for j in wanted
                }
                pairs = [row[2:] for row in found if row[:2] == (layer, image) and row[2] in of_name]
                assert len(pairs) == min(len(of_name), len(wanted))
                assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
                total = sum(cost[i, j] for i, j in pairs)  # a pair outside the group is no key
                assert total == pytest.approx(cheapest([[cost[i, j] for j in wanted] for i in of_name]), abs=1e-4)
                expected_count += len(pairs)
    assert len(found) == expected_count


def test_an_object_of_another_category_is_never_matched() -> None:
    target_boxes = random_boxes(1, 1)
    boxes = torch.cat([target_boxes, random_boxes(1, 1)], dim=1)[None]
    matches = match_groups(
        torch.tensor([[[9.0, -9.0]]]), boxes, torch.tensor([[4, 7]]), target_boxes, torch.tensor([[7]]), CONFIG
    )
    assert rows(matches) == [(0, 0, 1, 0)]


def test_permuting_queries_permutes_matches() -> None:
    logits, boxes, category = torch.randn(2, 2, 12), random_boxes(2, 2, 12), torch.randint(0, 3, (2, 12))
    target_boxes, labels = random_boxes(2, 5), torch.randint(0, 3, (2, 5))
    order = torch.randperm(12)
    straight = match_groups(logits, boxes, category, target_boxes, labels, CONFIG)
    permuted = match_groups(logits[..., order], boxes[:, :, order], category[:, order], target_boxes, labels, CONFIG)
    assert sorted(rows(straight)) == sorted((r, b, int(order[q]), m) for r, b, q, m in rows(permuted))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)], ids=["one object", "one query"])
def test_equal_costs_are_settled_as_scipy_settles_them(shape: tuple[int, int]) -> None:
    queries, objects = shape
    logits, boxes = torch.zeros(1, 1, queries), torch.full((1, 1, queries, 4), 0.5)
    target_boxes, labels = torch.full((1, objects, 4), 0.4), torch.zeros(1, objects).long()
    matches = match_groups(logits, boxes, torch.zeros(1, queries).long(), target_boxes, labels, CONFIG)
    expected = linear_sum_assignment(np.ones(shape))
    assert [matches.query.tolist(), matches.target.tolist()] == [index.tolist() for index in expected]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_costs_that_are_no_numbers_come_last_and_are_reported(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    target_boxes = random_boxes(1, 2)
    boxes = torch.cat([target_boxes, random_boxes(1, 1)], dim=1)[None]
    boxes[0, 0, 0] = bad
    with caplog.at_level(logging.WARNING, logger="metr"):
        matches = match_groups(
            torch.zeros(1, 1, 3), boxes, torch.zeros(1, 3).long(), target_boxes, torch.zeros(1, 2).long(), CONFIG
        )
    assert sorted(matches.query.tolist()) == [1, 2]
    assert sorted(matches.target.tolist()) == [0, 1]
    assert [record.getMessage()[:7] for record in caplog.records] == ["2 of 6 "]


def test_half_precision_is_matched_in_full_precision() -> None:
    logits, boxes = torch.randn(1, 2, 20).bfloat16(), random_boxes(1, 2, 20).bfloat16()
    category, target_boxes, labels = torch.zeros(2, 20).long(), random_boxes(2, 9), torch.zeros(2, 9).long()
    half = match_groups(logits, boxes, category, target_boxes, labels, CONFIG)
    assert rows(half) == rows(match_groups(logits.float(), boxes.float(), category, target_boxes, labels, CONFIG))


def test_counts_what_was_left_over_and_how_well_the_rest_fits() -> None:
    output = random_output([[0, 1], [1, 2]], [[0, 0, 1], [1]], vocabulary=4, layers=3)
    # First image: category 1 has one query for two objects, 3 is not kept. Second: 0 is not kept; one row of padding.
    targets = Targets.stack([image_targets([0, 1, 1, 3], 4), image_targets([2, 0, 0], 4)])
    _, matches = SetCriterion(CONFIG)(output, targets)
    found = match_statistics(output, targets, matches)
    assert (int(found.objects), int(found.without_slot), int(found.crowded_out)) == (7, 3, 1)
    last = matches.layer == 3
    ious = [
        paired_iou(cxcywh_to_xyxy(output.boxes[-1, b, q].detach()), cxcywh_to_xyxy(targets.boxes[b, m]))
        for b, q, m in zip(matches.image[last], matches.query[last], matches.target[last], strict=True)
    ]
    assert len(ious) == 3
    torch.testing.assert_close(found.iou, torch.stack(ious).mean())
    assert not found.iou.requires_grad


def test_the_fit_is_that_of_the_last_layer() -> None:
    output, targets = random_output([[0]], [[0, 0]], vocabulary=1), image_targets([0], 1)
    exact, far = targets.boxes[0, 0], torch.tensor([0.95, 0.95, 0.01, 0.01])
    boxes = torch.stack([torch.stack([exact, far]), torch.stack([far, exact])]).unsqueeze(1)
    output = replace(output, logits=torch.zeros(2, 1, 2), boxes=boxes)
    found = match_statistics(output, targets, SetCriterion(CONFIG)(output, targets)[1])
    torch.testing.assert_close(found.iou, torch.tensor(1.0))


def test_an_empty_batch_has_figures_too() -> None:
    output, targets = random_output([[0]], [[0]], vocabulary=1), image_targets([], 1)
    found = match_statistics(output, targets, SetCriterion(CONFIG)(output, targets)[1])
    assert [int(figure) for figure in (found.objects, found.without_slot, found.crowded_out)] == [0, 0, 0]
    assert float(found.iou) == 0
