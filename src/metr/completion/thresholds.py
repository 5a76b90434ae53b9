"""The score from which a detector is sure of a name, measured where the name is annotated."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from scipy.optimize import isotonic_regression

from metr.boxes import pairwise_coverage, pairwise_iou
from metr.config import Config
from metr.data.records import ImageRecord
from metr.errors import counted
from metr.inference.config import InferenceConfig, PostprocessConfig

# Below this score nothing is kept of an image; no sensible threshold is as low.
LEAST_SCORE = 0.05
# A precision that rests on fewer objects found is chance.
_LEAST_FOUND = 5

SplitChoice = Literal["train", "val", "test"]


class CompletionConfig(Config):
    """When a detector is sure of a name, and which images are completed."""

    precision: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Precision that the detections of a name must have on the val split of the datasets that annotate it."""
    iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    """IoU from which a detection is right, and from which a box repeats a person's of the same meaning."""
    least_objects: Annotated[int, Field(gt=0)] = 10
    """Objects of a name in val below which its threshold cannot be told: the name is left out."""
    splits: tuple[SplitChoice, ...] = ("train",)
    """Splits that are completed. The others stay as people labelled them, so that they can judge a detector."""
    inference: InferenceConfig = InferenceConfig(postprocess=PostprocessConfig(max_detections=300))
    """How the images go through the network."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a detector found in an image: boxes xyxy in pixels of the image as shown, `size` (height, width)."""

    size: tuple[int, int]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]


def best_of_places(found: Found, iou: float, free: Collection[int] = ()) -> Found:
    """What was found, but at each place only what the detector is surest of: of two names, the other is in doubt.

    Args:
        found: What was found.
        iou: From which two boxes are at one place.
        free: Labels that are kept beside others.
    """
    if not len(found.scores):
        return found
    at_one_place = iou_of(found.boxes, found.boxes) >= iou
    better = found.scores[None, :] > found.scores[:, None]
    rival = at_one_place & better & (found.labels[None, :] != found.labels[:, None])
    keep = ~rival.any(axis=1) | np.isin(found.labels, list(free))
    return replace(found, boxes=found.boxes[keep], scores=found.scores[keep], labels=found.labels[keep])


@dataclass(frozen=True, kw_only=True)
class NameThreshold:
    """From which score a detector is sure of a name; None, and why, where it is of no score.

    `precision` is that at the threshold, on `objects` objects of val, of which `found` were found; None where the
    threshold was given by hand. `elsewhere` boxes of the name lay on objects that other datasets call otherwise.
    """

    name: str
    threshold: float | None
    precision: float | None = None
    objects: int = 0
    found: int = 0
    elsewhere: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An image with its annotations, upright, the names of its labels, and what was found in it.

    `alike` gives for names of other datasets the dataset's own name that seems to mean the same.
    """

    record: ImageRecord
    categories: tuple[str, ...]
    found: Found
    alike: Mapping[str, str] = field(default_factory=dict)


def thresholds(images: Iterable[Judged], names: Sequence[str], config: CompletionConfig) -> dict[str, NameThreshold]:
    """The lowest score of each name at which its precision is what `config` asks for.

    An image counts for the names that are annotated exhaustively in it. Where objects of others were drawn all the
    same, a detection on one of them counts and one elsewhere does not. Ignored boxes count neither for nor against.
    Where a name is not annotated nothing is known of it but this: on an object that people call otherwise it is wrong.

    Args:
        images: Images of val splits of all datasets; `Found.labels` are rows of `names`.
        names: The names.
        config: The precision, the IoU, and how many objects a name needs.
    """
    scores: dict[str, list[tuple[float, bool]]] = {name: [] for name in names}
    objects, elsewhere = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for one in images:
        rows = {name: row for row, name in enumerate(one.categories)}
        annotated = range(len(rows)) if one.record.annotated is None else one.record.annotated
        for label, name in enumerate(names):
            if name not in rows:
                wrong = _on_others(one, label, rows.get(one.alike.get(name, "")), config.iou)
                scores[name] += [(score, False) for score in wrong]
                elsewhere[name] += len(wrong)
                continue
            mine = one.record.labels == rows[name]
            objects[name] += int((mine & ~one.record.ignore).sum())
            right, counts = _judged(one, mine, one.found.labels == label, config.iou)
            counts &= right | (rows[name] in annotated)
            values = one.found.scores[one.found.labels == label]
            scores[name] += zip(values[counts].tolist(), right[counts].tolist(), strict=True)
    told = {name: _threshold(name, scores[name], objects[name], config) for name in names}
    return {name: _with_those_elsewhere(one, elsewhere[name]) for name, one in told.items()}


def _with_those_elsewhere(one: NameThreshold, count: int) -> NameThreshold:
    """With the number of boxes that were wrong in other datasets, which is a reason where the name is left out."""
    why = f"; {counted(count, 'box', 'boxes')} on what other datasets call otherwise" if one.why and count else ""
    return replace(one, elsewhere=count, why=one.why + why)


def _on_others(one: Judged, label: int, alike: int | None, iou: float) -> list[float]:
    """The scores of a name's detections on objects of other names; objects of `alike` may be of this one."""
    asked = one.found.labels == label
    objects = one.record.boxes[~one.record.ignore & (one.record.labels != (-1 if alike is None else alike))]
    if not asked.any() or not len(objects):
        return []
    scores: list[float] = one.found.scores[asked][iou_of(one.found.boxes[asked], objects).max(axis=1) >= iou].tolist()
    return scores


def _judged(
    one: Judged, mine: Bool[np.ndarray, "m"], asked: Bool[np.ndarray, "n"], iou: float
) -> tuple[Bool[np.ndarray, "k"], Bool[np.ndarray, "k"]]:
    """Which detections of a name are right, and which count: those on ignored boxes do not."""
    boxes, scores = one.found.boxes[asked], one.found.scores[asked]
    right, counts = np.zeros(len(boxes), dtype=bool), np.ones(len(boxes), dtype=bool)
    truth, ignored = (one.record.boxes[mine & chosen] for chosen in (~one.record.ignore, one.record.ignore))
    overlap = iou_of(boxes, truth)
    for row in np.argsort(-scores, kind="stable").tolist():
        best = int(overlap[row].argmax()) if overlap.shape[1] else -1
        if best >= 0 and overlap[row, best] >= iou:
            right[row] = True
            overlap[:, best] = 0  # an object is found once
    if len(ignored) and len(boxes):
        covered = pairwise_coverage(*map(torch.from_numpy, (boxes, ignored.astype(boxes.dtype)))).numpy().max(axis=1)
        counts &= right | (covered < iou)
    return right, counts


def iou_of(first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """The IoU of every two boxes."""
    one, two = (torch.from_numpy(np.asarray(boxes, dtype=np.float64)) for boxes in (first, second))
    return np.asarray(pairwise_iou(one, two).numpy())


def _threshold(
    name: str, scores: Sequence[tuple[float, bool]], objects: int, config: CompletionConfig
) -> NameThreshold:
    if objects < config.least_objects:
        why = f"{counted(objects, 'object')} in val, {config.least_objects} are needed"
        return NameThreshold(name=name, threshold=None, objects=objects, why=why)
    in_order = sorted(scores, key=lambda pair: -pair[0])
    values, right = np.array([score for score, _ in in_order]), np.cumsum([one for _, one in in_order])
    precision = right / np.arange(1, len(values) + 1)
    last_of_equals = np.append(values[1:] < values[:-1], True)[: len(values)]
    reached = np.flatnonzero((precision >= config.precision) & (_here(in_order) >= config.precision) & last_of_equals)
    if not len(reached):
        best = f"{float(precision[last_of_equals].max()):.2f}" if len(values) else "nothing is found"
        why = f"precision {config.precision:g} is never reached (best: {best})"
        return NameThreshold(name=name, threshold=None, objects=objects, why=why)
    place = int(reached[-1])
    found = int(right[place])
    enough = found >= _LEAST_FOUND
    return NameThreshold(
        name=name,
        threshold=float(values[place]) if enough else None,
        precision=float(precision[place]),
        objects=objects,
        found=found,
        why="" if enough else f"sure of {counted(found, 'object')} in val alone, {_LEAST_FOUND} are needed",
    )


def _here(in_order: Sequence[tuple[float, bool]]) -> Float[np.ndarray, "n"]:
    """How many of the detections near each score are right, which never falls with the score: isotonic regression.

    What is above a score may be right in the mean while what is near it is not; in another field most boxes are near.
    """
    right = np.array([one for _, one in in_order], dtype=np.float64)
    return np.asarray(isotonic_regression(right, increasing=False).x) if len(right) else right


def given_thresholds(values: Mapping[str, float]) -> dict[str, NameThreshold]:
    """Thresholds that a user chose."""
    return {name: NameThreshold(name=name, threshold=value) for name, value in values.items()}
