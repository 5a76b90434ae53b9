"""What a network answers about the images of one dataset, collected batch by batch and from all processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.errors import DataError
from metr.evaluation.coco import CocoScorer
from metr.evaluation.results import Mode, PresenceRecall, presence_recall
from metr.inference.config import PostprocessConfig
from metr.inference.postprocess import ImageId, postprocess
from metr.process_group import gathered
from metr.processes import process_count
from metr.structures import Batch, Detections, DetectorOutput


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A vocabulary to run the network with; `columns[c]` is the row of the dataset's category c in it."""

    names: tuple[str, ...]
    text: Float[Tensor, "v t"]
    columns: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a detector answered about the images of one dataset, to the question `DatasetReport.asked`.

    `annotations` are those of the images that could be read, which `scorer` knows as well; `names` is the vocabulary.
    `presence` has the probability (0 to 1) of each name of the vocabulary in some of the images.
    """

    dataset: str
    mode: Mode
    annotations: Annotations
    scorer: CocoScorer
    names: tuple[str, ...]
    detections: Mapping[ImageId, Detections]
    presence: Mapping[ImageId, Float[Tensor, "v"]]


@dataclass
class Answers:
    """The network's answers so far to one question.

    `detections` has an entry for each image that was seen. `recall` counts at each K of `recall_at`. `presence` has the
    probability of each name in those of the images `looked_into` that were seen.
    """

    question: Question
    recall_at: tuple[int, ...]
    detections: dict[ImageId, Detections] = field(default_factory=dict)
    recall: PresenceRecall = field(default_factory=PresenceRecall)
    looked_into: frozenset[ImageId] = frozenset()
    presence: dict[ImageId, Float[Tensor, "v"]] = field(default_factory=dict)

    def add(
        self, output: DetectorOutput, batch: Batch, shown: Sequence[ImageRecord], config: PostprocessConfig | None
    ) -> None:
        """Adds the answer to one batch, whose images are those of the records `shown`."""
        found = postprocess(output, batch.original_sizes, self.question.names, config)
        self.detections.update(zip(batch.image_ids, (one.to("cpu") for one in found), strict=True))
        logits = output.categories.presence_logits[-1]
        present = _present(shown, self.question.columns, len(self.question.names)).to(logits.device)
        self.recall += presence_recall(logits, present, self.recall_at)
        for row, image_id in enumerate(batch.image_ids):
            if image_id in self.looked_into:
                self.presence[image_id] = logits[row].float().sigmoid().cpu()

    def of_all_processes(self, image_ids: Sequence[ImageId], dataset: str) -> "Answers":
        """The answers that all processes have collected, in the main process; in the others nothing.

        They travel as a few tensors: which images, how many detections each of them has, and all of these in a row.

        Args:
            image_ids: Those of the dataset, in an order that all processes share.
            dataset: Its name, for the error.

        Raises:
            DataError: two processes have evaluated the same image.
        """
        if process_count() == 1:
            return self
        position = {image_id: number for number, image_id in enumerate(image_ids)}
        own = list(self.detections.items())
        seen = [(position[image_id], len(found)) for image_id, found in own]
        images = gathered(torch.tensor(seen, dtype=torch.int64).reshape(-1, 2))
        boxes = gathered(torch.cat([torch.zeros(0, 4), *(found.boxes for _, found in own)]))
        scores = gathered(torch.cat([torch.zeros(0), *(found.scores for _, found in own)]))
        labels = gathered(torch.cat([torch.zeros(0, dtype=torch.int64), *(found.labels for _, found in own)]))
        hits = [self.recall.hits.get(k, 0) for k in self.recall_at]
        own_presence = list(self.presence.items())
        looked = gathered(torch.tensor([position[image_id] for image_id, _ in own_presence], dtype=torch.int64))
        chances = gathered(torch.stack([torch.zeros(len(self.question.names)), *(row for _, row in own_presence)])[1:])
        pairs, *kept = gathered(torch.tensor([[self.recall.pairs, *hits]])).sum(0).tolist()

        recall = PresenceRecall(pairs=pairs, hits=dict(zip(self.recall_at, kept, strict=True)))
        everyone = Answers(question=self.question, recall_at=self.recall_at, recall=recall)
        numbers, lengths = images.T.tolist()
        parts = zip(*(torch.split(rows, lengths) for rows in (boxes, scores, labels)), strict=True)
        for number, (box, score, label) in zip(numbers, parts, strict=True):
            if image_ids[number] in everyone.detections:
                raise DataError(f"two processes have evaluated the image {image_ids[number]!r}", where=dataset)
            found = Detections(boxes=box, scores=score, labels=label, names=self.question.names)
            everyone.detections[image_ids[number]] = found
        everyone.presence = {image_ids[number]: row for number, row in zip(looked.tolist(), chances, strict=True)}
        return everyone


def records_of(batch: Batch, records: Mapping[ImageId, ImageRecord], dataset: str) -> list[ImageRecord]:
    """The annotations of a batch's images.

    Raises:
        DataError: an image is not in the annotations.
    """
    strange = [image_id for image_id in batch.image_ids if image_id not in records]
    if strange:
        raise DataError(f"image {strange[0]!r} is not in the annotations", where=dataset)
    return [records[image_id] for image_id in batch.image_ids]


def seen_annotations(
    annotations: Annotations, records: Sequence[ImageRecord], images: Mapping[ImageId, Detections]
) -> InMemoryAnnotations:
    """The annotations of the images that the network saw."""
    return InMemoryAnnotations(
        name=annotations.name,
        split=annotations.split,
        categories=annotations.categories,
        records=tuple(record for record in records if record.image_id in images),
        format=annotations.format,
    )


def _present(records: Sequence[ImageRecord], columns: Sequence[int], names: int) -> Bool[Tensor, "b v"]:
    """True where a category is annotated in an image and has an object there."""
    present = torch.zeros(len(records), names, dtype=torch.bool)
    for row, record in zip(present, records, strict=True):
        labels = {*record.labels[~record.ignore].tolist()}
        if record.annotated is not None:
            labels &= {*record.annotated}
        row[[columns[label] for label in labels]] = True
    return present
