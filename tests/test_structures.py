"""Structures that cross module borders."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from metr import structures
from metr.structures import (
    NO_OBJECT,
    Batch,
    Categories,
    DenoisingOutput,
    DenoisingPlan,
    Detections,
    DetectorOutput,
    Losses,
    Proposals,
    Targets,
)


def targets() -> Targets:
    return Targets(
        boxes=torch.rand(1, 3, 4),
        labels=torch.tensor([[0, 2, 2]]),
        ignore_boxes=torch.rand(1, 1, 4),
        ignore_labels=torch.tensor([[1]]),
        annotated=torch.tensor([[True, False, True, False]]),
        assumed_negative=torch.tensor([[False, True, False, False]]),
    )


def batch() -> Batch:
    return Batch(
        images=torch.rand(2, 3, 8, 12),
        padding_mask=torch.zeros(2, 8, 12, dtype=torch.bool),
        targets=Targets.stack([targets(), targets()]),
        image_ids=(7, "b.jpg"),
        original_sizes=((80, 120), (90, 60)),
        sizes=((8, 12), (8, 5)),
        datasets=("cells", "cards"),
    )


def output() -> DetectorOutput:
    whole, yes = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    plan = DenoisingPlan(slot=whole, target=whole, positive=yes, valid=yes)
    return DetectorOutput(
        logits=torch.randn(3, 2, 5),
        boxes=torch.rand(3, 2, 5, 4),
        slot=whole,
        valid=yes,
        categories=Categories(
            presence_logits=torch.randn(2, 2, 6),
            text=torch.randn(6, 8),
            tokens=torch.randn(2, 6, 8),
            ids=torch.tensor([[1, 3, 4], [0, 5, 0]]),
            valid=torch.tensor([[True, True, True], [True, True, False]]),
        ),
        proposals=Proposals(
            logits=torch.randn(2, 5), boxes=torch.rand(2, 5, 4), place=whole, slot=whole, rank=whole, valid=yes
        ),
        denoising=DenoisingOutput(logits=torch.randn(3, 2, 5), boxes=torch.rand(3, 2, 5, 4), plan=plan),
    )


def detections() -> Detections:
    return Detections(boxes=torch.rand(2, 4), scores=torch.rand(2), labels=torch.tensor([1, 0]), names=("a", "b"))


MAKERS = [targets, batch, output, detections]


def tensors(value: object) -> list[Tensor]:
    """Every tensor inside a structure, however deep."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors(item)]
    if is_dataclass(value):
        return [tensor for f in fields(value) for tensor in tensors(getattr(value, f.name))]
    return []


@pytest.mark.parametrize("make", MAKERS)
def test_every_tensor_moves(make: Callable[[], Any]) -> None:
    there = make()
    moved = there.to("meta")
    assert type(moved) is type(there)
    before, after = tensors(there), tensors(moved)
    assert len(before) == len(after) > 0
    assert all(tensor.device.type == "meta" for tensor in after)
    assert all(tensor.device.type == "cpu" for tensor in before)
    assert [tensor.shape for tensor in after] == [tensor.shape for tensor in before]


def test_what_is_no_tensor_stays() -> None:
    before = batch()
    after = before.to("meta")
    assert after.image_ids == before.image_ids
    assert after.original_sizes == before.original_sizes
    assert after.sizes == before.sizes
    assert after.datasets == before.datasets
    assert replace(output(), denoising=None).to("meta").denoising is None


def test_structures_are_frozen_and_take_keywords_only() -> None:
    found = [item for item in vars(structures).values() if is_dataclass(item) and isinstance(item, type)]
    assert len(found) >= 12
    for structure in found:
        assert structure.__dataclass_params__.frozen, structure
        assert all(f.kw_only for f in fields(structure)), structure
    with pytest.raises(FrozenInstanceError):
        targets().boxes = torch.rand(1, 1, 4)  # type: ignore[misc]


def test_shapes_are_executed() -> None:
    """The annotations of the structures are checked while the tests run."""
    with pytest.raises(TypeCheckError):
        replace(targets(), labels=torch.tensor([[0, 1]]))
    with pytest.raises(TypeCheckError):
        replace(targets(), boxes=torch.rand(1, 3, 5))
    with pytest.raises(TypeCheckError):
        replace(batch(), padding_mask=torch.zeros(2, 8, 11, dtype=torch.bool))


def image(labels: list[int], ignored: list[int], annotated: list[int], assumed: list[int]) -> Targets:
    """One image of a vocabulary of five names."""
    known, taken = ((torch.arange(5).unsqueeze(1) == torch.tensor(rows)).any(1) for rows in (annotated, assumed))
    return Targets(
        boxes=torch.rand(1, len(labels), 4),
        labels=torch.tensor([labels], dtype=torch.int64),
        ignore_boxes=torch.rand(1, len(ignored), 4),
        ignore_labels=torch.tensor([ignored], dtype=torch.int64),
        annotated=known.unsqueeze(0),
        assumed_negative=taken.unsqueeze(0),
    )


def test_stacking_keeps_every_object_in_its_place() -> None:
    parts = [image([2, 0, 2], [], [0], []), image([], [3], [0, 1, 2, 3], []), image([4], [1, 1], [4], [1, 2, 3])]
    stacked = Targets.stack(parts)
    assert stacked.labels.tolist() == [[2, 0, 2], [NO_OBJECT] * 3, [4, NO_OBJECT, NO_OBJECT]]
    assert stacked.ignore_labels.tolist() == [[NO_OBJECT] * 2, [3, NO_OBJECT], [1, 1]]
    assert stacked.is_object.sum(1).tolist() == [3, 0, 1]
    for row, part in enumerate(parts):
        assert torch.equal(stacked.boxes[row, : part.boxes.shape[1]], part.boxes[0])
        assert torch.equal(stacked.ignore_boxes[row, : part.ignore_boxes.shape[1]], part.ignore_boxes[0])
        for name in ("annotated", "assumed_negative", "present", "ignored", "absent"):
            assert torch.equal(getattr(stacked, name)[row], getattr(part, name)[0]), name
    # batches are stacked like single images
    again = Targets.stack([Targets.stack(parts[:2]), parts[2]])
    tensors = [f.name for f in fields(stacked) if f.name != "noise_seeds"]
    assert all(torch.equal(getattr(again, name), getattr(stacked, name)) for name in tensors)
    seeded = [replace(part, noise_seeds=(number,)) for number, part in enumerate(parts)]
    assert Targets.stack(seeded).noise_seeds == (0, 1, 2)


def test_present_and_absent() -> None:
    first, second = image([2, 0, 2], [], [0], []), image([], [3], [0, 1, 2, 3], [])
    assert first.present.tolist() == [[True, False, True, False, False]]
    assert first.absent.tolist() == [[False] * 5]
    assert second.present.tolist() == [[False] * 5]
    assert second.absent.tolist() == [[True, True, True, False, False]]


def test_what_is_assumed_negative_is_absent_unless_something_of_it_is_there() -> None:
    one = image([2], [3], [0], [1, 2, 3])
    assert one.absent.tolist() == [[True, True, False, False, False]]
    assert one.annotated.tolist() == [[True, False, False, False, False]]


def test_boxes_of_objects_by_their_index() -> None:
    stacked = Targets.stack([image([2, 0], [], [], []), image([1], [], [], [])])
    found = stacked.boxes_of(torch.tensor([[[1, 0, NO_OBJECT], [0, NO_OBJECT, 0]]]))
    assert torch.equal(found[0, 0, :2], stacked.boxes[0].flip(0))
    assert torch.equal(found[0, 1, [0, 2]], stacked.boxes[1, [0, 0]])
    assert image([], [], [], []).boxes_of(torch.tensor([[[NO_OBJECT]]])).isfinite().all()


def test_kept_tokens_are_those_of_the_ids() -> None:
    categories = output().categories
    kept = categories.kept_tokens
    for image in range(2):
        for slot in range(3):
            assert torch.equal(kept[image, slot], categories.tokens[image, categories.ids[image, slot]])


def test_total_is_the_sum_of_the_terms() -> None:
    a, b = torch.tensor(1.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    losses = Losses(terms={"one": a, "two": 3 * b})
    assert losses.total.item() == 7.5
    assert {name: value.item() for name, value in losses.items()} == {"one": 1.5, "two": 6.0}
    losses.total.backward()
    assert a.grad == 1
    assert b.grad == 3


def test_a_broken_term_shows_in_the_total() -> None:
    assert Losses(terms={"one": torch.tensor(1.0), "two": torch.tensor(torch.nan)}).total.isnan()


def test_detections_have_a_length() -> None:
    assert len(detections()) == 2
    none = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long(), names=("a",))
    assert len(none) == 0


@pytest.mark.parametrize("count", [0, 2])
def test_detections_for_supervision(count: int) -> None:
    found = Detections(
        boxes=torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])[:count],
        scores=torch.tensor([0.9, 0.4])[:count],
        labels=torch.tensor([2, 0])[:count],
        names=("cat", "dog", "bird"),
    )
    theirs = found.to_supervision()
    assert len(theirs) == count
    assert [(box.tolist(), score, label) for box, _, score, label, _, _ in theirs] == [
        (box.tolist(), score, label)
        for box, score, label in zip(found.boxes, found.scores.numpy(), found.labels.tolist(), strict=True)
    ]
    assert list(theirs["class_name"]) == ["bird", "cat"][:count]
