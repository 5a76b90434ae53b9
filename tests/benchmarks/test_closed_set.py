"""The closed-set baseline is a fair one: it matches exactly, is asked every label, and answers by names."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from types import ModuleType

import pytest
import torch

from metr.boxes import cxcywh_to_xyxy, paired_giou
from metr.losses.classification import focal_cost
from metr.losses.config import CriterionConfig
from metr.structures import Targets
from metr.text.vocabulary import Vocabulary

from small import small_config, targets_of

LABELS, NAMES = ("bear", "king", "bear"), ("king", "bear")
BOXES = [[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]]
IMAGES, MASK = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
TARGETS = Targets.stack([targets_of(BOXES, [0, 1], words=3), targets_of(BOXES[:1], [2], words=3)])


@pytest.fixture
def closed_set(study_of: Callable[[str], ModuleType]) -> ModuleType:
    torch.manual_seed(0)
    return study_of("closed_set")


def test_labels_are_concatenated_and_none_is_shared(closed_set: ModuleType) -> None:
    union = Vocabulary.union({"zoo": ("bear", "fox"), "cards": ("king", "bear")})
    vocabulary, names = closed_set.concatenated(union)
    assert len(union) == 3
    assert len(vocabulary) == len(set(vocabulary.names)) == 4
    assert names == ("bear", "fox", "king", "bear")
    assert vocabulary.rows("cards").tolist() == [2, 3]


def test_matching_is_the_cheapest_over_the_whole_image(closed_set: ModuleType) -> None:
    network = closed_set.ClosedSetDetector(small_config(), LABELS, NAMES).train()
    output, config = network(IMAGES, MASK, torch.eye(2), TARGETS), CriterionConfig()
    matches = closed_set.ClosedSetCriterion(config).match(output, TARGETS)
    layers, labels, objects = len(output.every_logits), TARGETS.labels[0], TARGETS.boxes[0]
    for layer in range(layers):
        logits, boxes = output.every_logits[layer, 0].detach(), output.every_boxes[layer, 0].detach()
        cost = 2 * focal_cost(logits[:, labels], config.focal_alpha, config.focal_gamma)
        cost += 5 * (boxes.unsqueeze(1) - objects).abs().sum(-1)
        cost -= 2 * paired_giou(cxcywh_to_xyxy(boxes).unsqueeze(1), cxcywh_to_xyxy(objects).unsqueeze(0))
        best = min(permutations(range(len(cost)), 2), key=lambda pair, cost=cost: float(cost[pair, (0, 1)].sum()))
        here = (matches.layer == layer) & (matches.image == 0)
        found = dict(zip(matches.target[here].tolist(), matches.query[here].tolist(), strict=True))
        assert found == dict(enumerate(best))
    assert len(matches.layer) == layers * 3


def test_every_parameter_learns_and_no_label_is_left_unasked(closed_set: ModuleType) -> None:
    network = closed_set.ClosedSetDetector(small_config(), LABELS, NAMES).train()
    output = network(IMAGES, MASK, torch.eye(2), TARGETS)
    output.every_logits.retain_grad()
    criterion = closed_set.ClosedSetCriterion(CriterionConfig(classification="focal"))
    criterion(output, TARGETS)[0].total.backward()
    silent = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not [name for name in silent if not name.startswith("backbone")]
    assert (output.every_logits.grad != 0).all()
    unannotated = replace(TARGETS, annotated=torch.zeros(2, 3, dtype=torch.bool))
    totals = [criterion(output, targets)[0].total for targets in (TARGETS, unannotated)]
    torch.testing.assert_close(totals[0], totals[1])  # what nobody annotated counts as absent


def test_answers_are_those_of_the_names_asked_for(closed_set: ModuleType) -> None:
    network = closed_set.ClosedSetDetector(small_config(), LABELS, NAMES).eval()
    with torch.no_grad():
        both, bear = network(IMAGES, MASK, torch.eye(2)), network(IMAGES, MASK, torch.eye(2)[1:])
    labels = both.categories.ids.gather(1, both.slot)
    assert set(labels.flatten().tolist()) == {0, 1}
    # asked for bears alone, it says of bears what it said before
    for image in range(2):
        mine = both.logits[0, image][labels[image] == 1]
        torch.testing.assert_close(bear.logits[0, image][: len(mine)], mine)
    torch.testing.assert_close(bear.categories.presence_logits[0, :, 0], bear.logits[0].amax(1))
