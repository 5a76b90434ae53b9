"""Datasets of plain numbers and a network that answers by a script: what comes out of evaluation is then known."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.structures import Batch, Categories, Detections, DetectorOutput, Proposals, Targets

Box = tuple[float, float, float, float]

# Images are this large as stored, and half of it for the network.
HEIGHT, WIDTH = 80, 100


def record(
    image_id: int | str,
    objects: Sequence[tuple[int, Box]],
    *,
    crowds: Sequence[int] = (),
    annotated: tuple[int, ...] | None = None,
    areas: Sequence[float] | None = None,
) -> ImageRecord:
    """One image; boxes are xyxy, `crowds` counts those to ignore."""
    boxes = np.array([box for _, box in objects], dtype=np.float32).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    return ImageRecord(
        image_id=image_id,
        path=Path(f"{image_id}.jpg"),
        width=WIDTH,
        height=HEIGHT,
        boxes=boxes,
        labels=np.array([label for label, _ in objects], dtype=np.int64),
        areas=sides.prod(1) if areas is None else np.array(areas, dtype=np.float32),
        ignore=np.array([number in crowds for number in range(len(objects))], dtype=bool),
        annotated=annotated,
    )


def annotations(name: str, categories: Sequence[str], *records: ImageRecord) -> InMemoryAnnotations:
    return InMemoryAnnotations(name=name, split="val", categories=tuple(categories), records=records)


def detections(names: Sequence[str], *found: tuple[str, float, Box]) -> Detections:
    """Detections (name, score, xyxy box), best first."""
    return Detections(
        boxes=torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([score for _, score, _ in found], dtype=torch.float32),
        labels=torch.tensor([list(names).index(name) for name, _, _ in found], dtype=torch.int64),
        names=tuple(names),
    )


@dataclass(frozen=True)
class Answer:
    """A detection that the scripted network makes wherever its name is asked for."""

    name: str
    score: float
    box: Box


class ScriptedNetwork(nn.Module):
    """Answers image n (its first pixel is n / 255) with `script[n]`, less what the text does not ask for.

    Text embeddings are rows of the identity, one for each of `names`.
    """

    def __init__(self, names: Sequence[str], script: Mapping[int, Sequence[Answer]]) -> None:
        super().__init__()
        self.names, self.script = list(names), script
        self.asked: list[tuple[str, ...]] = []

    def forward(self, images: Tensor, padding_mask: Tensor, text: Tensor) -> DetectorOutput:
        asked = [self.names[row] for row in text.argmax(1).tolist()]
        self.asked.append(tuple(asked))
        numbers = (images[:, 0, 0, 0] * 255).round().int().tolist()
        answers = [[answer for answer in self.script[number] if answer.name in asked] for number in numbers]
        queries = max(1, *map(len, answers))
        logits, boxes = torch.full((1, len(images), queries), -9.0), torch.full((1, len(images), queries, 4), 0.5)
        slot = torch.zeros(len(images), queries, dtype=torch.int64)
        valid = torch.zeros(len(images), queries, dtype=torch.bool)
        presence = torch.full((1, len(images), len(asked)), -9.0)
        for image, found in enumerate(answers):
            for query, answer in enumerate(found):
                x0, y0, x1, y1 = answer.box
                sides = [(x0 + x1) / 2 / WIDTH, (y0 + y1) / 2 / HEIGHT, (x1 - x0) / WIDTH, (y1 - y0) / HEIGHT]
                logits[0, image, query] = torch.tensor(answer.score).logit()
                boxes[0, image, query] = torch.tensor(sides)
                slot[image, query], valid[image, query] = asked.index(answer.name), True
                column = asked.index(answer.name)
                presence[0, image, column] = max(float(presence[0, image, column]), float(logits[0, image, query]))
        ids = torch.arange(len(asked)).expand(len(images), -1)
        return DetectorOutput(
            logits=logits,
            boxes=boxes,
            slot=slot,
            valid=valid,
            categories=Categories(
                presence_logits=presence,
                text=text,
                tokens=text.expand(len(images), -1, -1),
                ids=ids,
                valid=torch.ones_like(ids, dtype=torch.bool),
            ),
            proposals=Proposals(logits=logits[0], boxes=boxes[0], place=slot, slot=slot, rank=slot, valid=valid),
        )


class Images:
    """Batches of two images, numbered by `numbers`, that can be gone through again and again."""

    def __init__(self, held: InMemoryAnnotations, numbers: Sequence[int], skip: Sequence[int] = ()) -> None:
        self.held, self.numbers, self.skip = held, numbers, skip

    def __iter__(self) -> Iterator[Batch]:
        there = [index for index in range(len(self.held)) if index not in self.skip]
        for start in range(0, len(there), 2):
            indices = there[start : start + 2]
            images = torch.zeros(len(indices), 3, HEIGHT // 2, WIDTH // 2)
            images[:, 0, 0, 0] = torch.tensor([self.numbers[index] for index in indices]) / 255
            yield Batch(
                images=images,
                padding_mask=torch.zeros(len(indices), HEIGHT // 2, WIDTH // 2, dtype=torch.bool),
                targets=_nothing_known(len(indices)),
                image_ids=tuple(self.held[index].image_id for index in indices),
                original_sizes=((HEIGHT, WIDTH),) * len(indices),
                sizes=((HEIGHT // 2, WIDTH // 2),) * len(indices),
                datasets=(self.held.name,) * len(indices),
            )


def _nothing_known(images: int) -> Targets:
    boxes, labels = torch.zeros(images, 0, 4), torch.zeros(images, 0, dtype=torch.int64)
    unknown = torch.zeros(images, 1, dtype=torch.bool)
    return Targets(
        boxes=boxes,
        labels=labels,
        ignore_boxes=boxes,
        ignore_labels=labels,
        annotated=unknown,
        assumed_negative=unknown,
    )
