"""Pseudo-labels: what the average of the weights adds to the annotations."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from metr.structures import Batch, Categories, DetectorOutput, Proposals, Targets
from metr.training.config import PseudoLabelConfig
from metr.training.step_targets import PseudoLabeler

WORDS = 5
UNANNOTATED = {"cells": torch.tensor([False, False, True, True, True])}
Answer = tuple[int, float, list[float]]


class Average(nn.Module):
    """Answers every image alike: presence probabilities, and (category, score, cxcywh box) for each query."""

    def __init__(self, presence: Sequence[float], answers: Sequence[Answer]) -> None:
        super().__init__()
        self.presence, self.answers = torch.tensor(presence), answers

    def forward(self, images: Tensor, padding_mask: Tensor, text: Tensor) -> DetectorOutput:
        batch, ids = len(images), torch.arange(WORDS).expand(len(images), -1)
        slot = torch.tensor([label for label, _, _ in self.answers]).expand(batch, -1)
        logits = torch.tensor([score for _, score, _ in self.answers]).logit().expand(1, batch, -1)
        boxes = torch.tensor([box for _, _, box in self.answers]).expand(1, batch, -1, -1)
        valid = torch.ones_like(slot, dtype=torch.bool)
        categories = Categories(
            presence_logits=self.presence.logit().expand(1, batch, -1),
            text=text,
            tokens=text.expand(batch, -1, -1),
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
        )
        proposals = Proposals(logits=logits[0], boxes=boxes[0], place=slot, slot=slot, rank=slot, valid=valid)
        return DetectorOutput(
            logits=logits, boxes=boxes, slot=slot, valid=valid, categories=categories, proposals=proposals
        )


def batch_of(target: Targets) -> Batch:
    return Batch(
        images=torch.zeros(1, 3, 32, 32),
        padding_mask=torch.zeros(1, 32, 32, dtype=torch.bool),
        targets=target,
        image_ids=(1,),
        original_sizes=((300, 400),),
        sizes=((32, 32),),
        datasets=("cells",),
    )


def target_of(boxes: Sequence[Sequence[float]] = (), labels: Sequence[int] = ()) -> Targets:
    return Targets(
        boxes=torch.tensor(boxes).reshape(1, -1, 4),
        labels=torch.tensor(labels, dtype=torch.int64).unsqueeze(0),
        ignore_boxes=torch.zeros(1, 0, 4),
        ignore_labels=torch.zeros(1, 0, dtype=torch.int64),
        annotated=~UNANNOTATED["cells"].unsqueeze(0),
        assumed_negative=torch.zeros(1, WORDS, dtype=torch.bool),
    )


def taught(target: Targets, presence: Sequence[float], answers: Sequence[Answer], **config: float) -> Targets:
    teacher = PseudoLabeler(
        PseudoLabelConfig(**{"absent_below": 0.1, "present_above": 0.5, "object_above": 0.5} | config), UNANNOTATED
    )
    return teacher(Average(presence, answers), batch_of(target), torch.eye(WORDS))


def labels_of(targets: Targets) -> list[int]:
    return targets.labels[targets.is_object].tolist()


HERE, THERE = [0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.3]


def test_only_unannotated_and_clearly_absent_categories_are_assumed_negative() -> None:
    found = taught(target_of(), [0.01, 0.9, 0.09, 0.11, 0.6], [(0, 0.9, HERE)])
    assert found.assumed_negative.tolist() == [[False, False, True, False, False]]
    assert torch.equal(found.annotated[0], ~UNANNOTATED["cells"])
    assert not found.is_object.any()


def test_clear_detections_of_clearly_present_unannotated_categories_become_objects() -> None:
    answers: list[Answer] = [(4, 0.8, HERE), (4, 0.4, THERE), (3, 0.9, THERE), (1, 0.9, THERE), (4, 0.7, HERE)]
    found = taught(target_of([THERE], [0]), [0.9, 0.9, 0.9, 0.4, 0.6], answers)
    # 4 here: yes, once. 4 there: its score is low. 3: its presence is low. 1: the dataset says that none is there.
    assert labels_of(found) == [0, 4]
    torch.testing.assert_close(found.boxes[found.is_object], torch.tensor([THERE, HERE]))
    assert not found.assumed_negative.any()


def test_thresholds_are_read() -> None:
    answers: list[Answer] = [(4, 0.8, HERE)]
    presence = [0.5, 0.5, 0.3, 0.3, 0.6]
    assert labels_of(taught(target_of(), presence, answers)) == [4]
    assert labels_of(taught(target_of(), presence, answers, present_above=0.7)) == []
    assert labels_of(taught(target_of(), presence, answers, object_above=0.9)) == []
    absent = taught(target_of(), presence, answers, absent_below=0.4).assumed_negative
    assert absent.tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_objects_that_are_there_already_are_not_doubled(shift: float) -> None:
    """An unannotated category may have objects: two datasets may be one image's."""
    moved = [HERE[0] + shift, *HERE[1:]]
    found = taught(target_of([moved], [4]), [0.5, 0.5, 0.5, 0.5, 0.9], [(4, 0.9, HERE), (4, 0.9, THERE)])
    assert labels_of(found) == [4, 4]
    torch.testing.assert_close(found.boxes[found.is_object], torch.tensor([moved, THERE]))
