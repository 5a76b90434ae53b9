"""Which of the boxes that a detector found are added to an image, and which names a dataset may get."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from metr.completion.thresholds import Found, NameThreshold, best_of_places, iou_of
from metr.data.images import FLIP_COLUMNS, FLIP_ROWS, read_header
from metr.data.records import ImageRecord
from metr.errors import DataError, MetrError
from metr.model import METR
from metr.text.config import BUNDLED
from metr.text.same_names import same_names
from metr.text.similar_names import EmbeddingSimilarity
from metr.text.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The names that a dataset with `own` ones may get: `rows` of the detector's names with their thresholds.

    `same` gives for a name the dataset's own name that seems to mean the same. Thresholds of `given` names were chosen
    by hand: these are added whatever else is at their place.
    """

    own: tuple[str, ...]
    names: tuple[str, ...]
    rows: Mapping[int, float]
    same: Mapping[int, str]
    given: frozenset[int] = frozenset()


def wanted_names(
    own: Sequence[str], in_files: Sequence[str], sure: Mapping[str, NameThreshold], names: Sequence[str], model: METR
) -> Wanted:
    """The names that a dataset may get: those that it annotates in no spelling.

    Args:
        own: The dataset's names.
        in_files: Those of its files, which the user may have renamed or left out.
        sure: The threshold of each name.
        names: What the detector is asked for.
        model: Knows names that are taken as others, and which embeddings tell names of one meaning.
    """
    aliases = model.checkpoint.detection.aliases
    annotated = {*own, *in_files, *(aliases[name] for name in own if name in aliases)}
    new = [name for name in names if name not in annotated and aliases.get(name) not in annotated]
    alike = same_names(new, tuple(own), _embeddings((*own, *new), model))
    spelt = {one.name for one in alike if one.by_spelling}
    same = {one.name: one.trained for one in alike if not one.by_spelling}
    rows = {
        row: threshold
        for row, name in enumerate(names)
        if name in new and name not in spelt and (threshold := sure[name].threshold) is not None
    }
    return Wanted(
        own=tuple(own),
        names=tuple(names),
        rows=rows,
        same={row: same[names[row]] for row in rows if names[row] in same},
        given=frozenset(row for row in rows if sure[names[row]].precision is None),
    )


def counterparts(own: Sequence[str], names: Sequence[str], model: METR) -> dict[str, str]:
    """The names that seem to mean one of a dataset's own, in other letters or another word, and that one."""
    aliases = model.checkpoint.detection.aliases
    new = [name for name in names if name not in own]
    alike = same_names(new, tuple(own), _embeddings((*own, *new), model))
    taken = {name: aliases[name] for name in new if aliases.get(name) in own}
    return {one.name: one.trained for one in alike} | taken


def _embeddings(names: Sequence[str], model: METR) -> EmbeddingSimilarity | None:
    """Embeddings by the bundled language model, for which the bound of one meaning was chosen; None without it."""
    if model.checkpoint.text_encoder.get("source") != BUNDLED:
        return None
    distinct = tuple(dict.fromkeys(names))
    try:
        return EmbeddingSimilarity(
            source=BUNDLED, names=distinct, vectors=model.embed(Vocabulary.of(distinct), tell=False).cpu()
        )
    except MetrError:  # spelling alone is compared
        return None


def completed_record(
    record: ImageRecord, upright: ImageRecord, found: Found, wanted: Wanted, iou: float
) -> tuple[ImageRecord, tuple[str, ...]]:
    """The boxes to add to an image, as a record of these alone with their scores, and the name of each.

    Args:
        record: What people annotated.
        upright: The same, its boxes turned with the image.
        found: What the detector found.
        wanted: The names that it may get.
        iou: From which two boxes are at one place.
    """
    found = best_of_places(found, iou, wanted.given)
    keep = found.scores >= np.array([wanted.rows.get(label, np.inf) for label in found.labels.tolist()])
    boxes = _in_pixels_of(upright, found)
    keep &= (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
    # a person has named what is there: by a word of the same meaning, or it is something else
    named = _on_one_of(boxes, upright.boxes[~upright.ignore], iou)
    for row, own in wanted.same.items():
        theirs = upright.boxes[upright.labels == list(wanted.own).index(own)]
        keep &= ~((found.labels == row) & _on_one_of(boxes, theirs, iou))
    keep &= ~named | np.isin(found.labels, list(wanted.given))
    stored = _as_stored(boxes[keep], record, upright)
    names = tuple(wanted.names[label] for label in found.labels[keep].tolist())
    sides = stored[:, 2:] - stored[:, :2]
    added = replace(
        record,
        boxes=stored.astype(np.float32),
        labels=found.labels[keep],
        areas=(sides[:, 0] * sides[:, 1]).astype(np.float32),
        ignore=np.zeros(len(names), dtype=bool),
        scores=found.scores[keep].astype(np.float32),
    )
    return added, names


def box_rows(
    dataset: str, split: str, image: Path, record: ImageRecord, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of `completed.json` for the boxes of an image, a name for each; `image` as its dataset has it."""
    assert record.scores is not None
    for name, box, score in zip(names, record.boxes.tolist(), record.scores.tolist(), strict=True):
        yield {
            "dataset": dataset,
            "split": split,
            "image": image.as_posix().encode(errors="replace").decode(),
            "name": name,
            "box": [round(side, 2) for side in box],
            "score": round(score, 5),
        }


def _in_pixels_of(record: ImageRecord, found: Found) -> Float[np.ndarray, "n 4"]:
    """What was found, in the pixels that a record declares and inside of the image."""
    sides = np.array([record.width, record.height] * 2, dtype=np.float64)
    scaled = found.boxes * sides / np.array([found.size[1], found.size[0]] * 2)
    return np.asarray(np.minimum(np.maximum(scaled, 0), sides))


def _on_one_of(boxes: Float[np.ndarray, "n 4"], theirs: Float[np.ndarray, "m 4"], iou: float) -> Bool[np.ndarray, "n"]:
    if not len(theirs):
        return np.zeros(len(boxes), dtype=bool)
    return np.asarray(iou_of(boxes, theirs).max(axis=1) >= iou)


def _as_stored(boxes: Float[np.ndarray, "n 4"], record: ImageRecord, upright: ImageRecord) -> Float[np.ndarray, "n 4"]:
    """Boxes of an image as shown, in its pixels as stored where the record means those."""
    if (record.width, record.height) == (upright.width, upright.height):
        return boxes
    try:
        orientation = read_header(record.path, record.source).orientation
    except DataError:
        return boxes
    left, top, right, bottom = boxes.T
    if orientation in FLIP_ROWS:
        top, bottom = upright.height - bottom, upright.height - top
    if orientation in FLIP_COLUMNS:
        left, right = upright.width - right, upright.width - left
    return np.stack([top, left, bottom, right], axis=1)
