"""Which detection is which object, and what is wrong with the others: the kinds of TIDE (Bolya et al., ECCV 2020).

Matching is the COCO protocol's at IoU 0.5; boxes are x, y, width, height in pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from metr.boxes import pairwise_coverage, pairwise_iou, xywh_to_xyxy, xyxy_to_xywh
from metr.evaluation.coco import MAX_DETECTIONS, CocoScorer
from metr.inference.postprocess import ImageId
from metr.structures import Detections

SAME_PLACE = 0.5
"""IoU from which a detection is at an object's place."""
NEAR = 0.1
"""IoU from which a detection is near an object."""
NOBODY = -1


class Kind(IntEnum):
    """What a detection is.

    `FOUND`: an object, with its name. `NAME`: at the place of an object of another name. `PLACE`: near an object of its
    name. `BOTH`: near an object of another name only. `DUPLICATE`: at an object that a better detection has found.
    `BACKGROUND`: near no object. `UNCOUNTED`: neither right nor wrong (a crowd's, or of a name that is not annotated in
    the image).
    """

    FOUND = 0
    NAME = 1
    PLACE = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5
    UNCOUNTED = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image: objects and crowds to find, and detections, best first.

    Labels are rows of the dataset's names, and then of the other names of the vocabulary. `counted`: the protocol
    counts the detection.
    """

    image_id: ImageId
    objects: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    crowd: Bool[np.ndarray, "m"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, "n"]
    found: Int[np.ndarray, "n"]
    counted: Bool[np.ndarray, "n"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What each detection is (`Kind`), and the object it is about, or `NOBODY`.

    `has` says which object has been found, crowds excepted; `missed` which one no detection accounts for: it is not
    found, and no detection has its place with another name, or its name near its place.
    """

    kind: Int[np.ndarray, "n"]
    about: Int[np.ndarray, "n"]
    has: Bool[np.ndarray, "m"]
    missed: Bool[np.ndarray, "m"]


def all_names(scorer: CocoScorer, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
    """The names that labels of a `Case` count: the dataset's, then those of the vocabulary that it lacks."""
    return tuple(dict.fromkeys((*scorer.categories, *vocabulary)))


def cases(scorer: CocoScorer, detections: Mapping[ImageId, Detections], names: tuple[str, ...]) -> Iterator[Case]:
    """The images of a dataset, in its order, with the detections that the protocol takes (the 100 best of an image).

    Args:
        scorer: Knows the objects.
        detections: By image id; an image without an entry has none.
        names: As `all_names` gives them.
    """
    row = {name: number for number, name in enumerate(names)}
    per_image: dict[int, list[Mapping[str, object]]] = {}
    for one in scorer.truth["annotations"]:
        per_image.setdefault(one["image_id"], []).append(one)
    for image_id, number in scorer.image_numbers.items():
        truth = per_image.get(number, [])
        found = detections.get(image_id)
        boxes, scores, labels = np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64)
        if found is not None:
            order = found.scores.argsort(descending=True, stable=True)[:MAX_DETECTIONS]
            boxes = xyxy_to_xywh(found.boxes[order].double()).numpy()
            scores = found.scores[order].double().numpy()
            own = np.array([row[name] for name in found.names], dtype=np.int64)
            labels = own[found.labels[order].numpy()]
        here = [number - 1 for number in scorer.scored[image_id]]
        yield Case(
            image_id=image_id,
            objects=np.array([one["bbox"] for one in truth], dtype=np.float64).reshape(-1, 4),
            labels=np.array([one["category_id"] for one in truth], dtype=np.int64) - 1,
            crowd=np.array([one["iscrowd"] for one in truth], dtype=bool),
            boxes=boxes,
            scores=scores,
            found=labels,
            counted=np.isin(labels, here),
        )


def overlaps(case: Case) -> Float[np.ndarray, "n m"]:
    """IoU of each detection and each object; of a crowd, the share of the detection inside it."""
    boxes, objects = (xywh_to_xyxy(torch.from_numpy(one)) for one in (case.boxes, case.objects))
    inside = pairwise_coverage(boxes, objects).numpy()
    return np.where(case.crowd[None], inside, pairwise_iou(boxes, objects).numpy())


def judge(case: Case) -> Verdict:
    """What each detection of an image is, and which objects nothing accounts for."""
    iou = overlaps(case)
    same = case.found[:, None] == case.labels[None]
    count, real = len(case.boxes), ~case.crowd
    kind = np.full(count, int(Kind.UNCOUNTED), dtype=np.int64)
    about = np.full(count, NOBODY, dtype=np.int64)
    has = _match(iou, same, case, kind, about)
    near_own = np.where(same & real, iou, 0.0)
    near_other = np.where(~same & real, iou, 0.0)
    for row in np.flatnonzero(case.counted & (about == NOBODY) & (kind != Kind.FOUND)).tolist():
        if _in_crowd(iou[row], same[row], case.crowd):
            continue
        kind[row], about[row] = _mistake(near_own[row], near_other[row])
    strange = ~case.counted & (near_other.max(1, initial=0.0) >= SAME_PLACE)
    if strange.any():
        about[strange] = near_other[strange].argmax(1)
    accounted = np.isin(kind, (Kind.NAME, Kind.PLACE)) & (about != NOBODY)
    missed = real & ~has
    missed[about[accounted]] = False
    return Verdict(kind=kind, about=about, has=has, missed=missed)


def _match(
    iou: Float[np.ndarray, "n m"],
    same: Bool[np.ndarray, "n m"],
    case: Case,
    kind: Int[np.ndarray, "n"],
    about: Int[np.ndarray, "n"],
) -> Bool[np.ndarray, "m"]:
    """Gives each detection, best first, the object of its name that it overlaps most and that is not taken yet."""
    taken = np.zeros(len(case.objects), dtype=bool)
    possible = same & ~case.crowd & (iou >= SAME_PLACE) & case.counted[:, None]
    for row in np.flatnonzero(possible.any(1)).tolist():
        free = possible[row] & ~taken
        if free.any():
            # of equal overlaps the last one, as the protocol's code has it
            best = len(free) - 1 - int(np.where(free, iou[row], -1.0)[::-1].argmax())
            kind[row], about[row], taken[best] = Kind.FOUND, best, True
    return taken


def _in_crowd(iou: Float[np.ndarray, "m"], same: Bool[np.ndarray, "m"], crowd: Bool[np.ndarray, "m"]) -> bool:
    return bool((same & crowd & (iou >= SAME_PLACE)).any())


def _mistake(own: Float[np.ndarray, "m"], other: Float[np.ndarray, "m"]) -> tuple[Kind, int]:
    """The kind of a wrong detection by its overlaps with objects of its name and of others, in TIDE's order."""
    if not len(own):
        return Kind.BACKGROUND, NOBODY
    nearest, strangest = int(own.argmax()), int(other.argmax())
    if NEAR <= own[nearest] < SAME_PLACE:
        return Kind.PLACE, nearest
    if other[strangest] >= SAME_PLACE:
        return Kind.NAME, strangest
    if own[nearest] >= SAME_PLACE:
        return Kind.DUPLICATE, nearest
    if other[strangest] <= NEAR:
        return Kind.BACKGROUND, NOBODY
    return Kind.BOTH, strangest


def paired(case: Case) -> list[tuple[int, int]]:
    """Pairs (detection, object) whatever their names are, for confusion between names.

    Best detections choose first: of the objects at their place that are not taken one of their own name, else the one
    they overlap most. Crowds are in no pair.
    """
    iou = np.where(case.crowd[None], 0.0, overlaps(case))
    same = case.found[:, None] == case.labels[None]
    taken = np.zeros(len(case.objects), dtype=bool)
    pairs = []
    for row in np.flatnonzero((iou >= SAME_PLACE).any(1)).tolist():
        free = np.where(taken | (iou[row] < SAME_PLACE), -1.0, iou[row] + same[row])
        best = int(free.argmax())
        if free[best] > 0:
            pairs.append((row, best))
            taken[best] = True
    return pairs
