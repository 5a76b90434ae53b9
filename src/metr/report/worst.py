"""The images that a detector and its annotations disagree on most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metr.data.images import read_annotated
from metr.data.records import ImageRecord
from metr.errors import DataError
from metr.evaluation.answers import Observation
from metr.evaluation.diagnosis import Judged
from metr.evaluation.matching import NOBODY, Case, Kind, Verdict, overlaps
from metr.inference.postprocess import ImageId
from metr.report.page import Picture, picture, said

WORST = 20
"""Images that a page shows."""
_LONGEST = 720  # pixels of an image's longer side
_MOST_BYTES = 180_000  # of an image
_LEAST = 0.01  # a probability below counts as this one
_MOST_MARKS = 150  # boxes of an image, each side
_MOST_REMARKS = 8
KINDS: dict[Kind, tuple[str, str]] = {
    Kind.FOUND: ("found", "found"),
    Kind.NAME: ("name", "wrong name"),
    Kind.PLACE: ("place", "wrong place"),
    Kind.BOTH: ("both", "wrong name and place"),
    Kind.DUPLICATE: ("duplicate", "duplicate"),
    Kind.BACKGROUND: ("background", "background"),
    Kind.UNCOUNTED: ("uncounted", "not counted"),
}
"""The class of the style sheet, and the words, for each kind of detection."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box in per cent of the image's sides, with what stands at it and the kind that its colour tells."""

    x: float
    y: float
    width: float
    height: float
    name: str
    score: float | None
    kind: str
    told: str


@dataclass(frozen=True, kw_only=True)
class WorstImage:
    """An image with its annotations and what is shown of its detections. `surprise` is in nats; see `surprise`."""

    dataset: str
    name: str
    surprise: float
    picture: Picture
    truth: tuple[Box, ...]
    found: tuple[Box, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    dataset: int
    row: int
    surprise: float


def surprise(every: Case, shown: Case, verdict: Verdict) -> float:
    """How much an image's annotations surprise the detector, in nats (the negative logarithm of a probability).

    Each wrong detection that is shown adds -log(1 - score). Each object that is not found among the shown ones adds
    -log of the best score with which its name was detected at its place, or of 0.01. Each counts 4.6 at most.
    """
    wrong = shown.scores[~np.isin(verdict.kind, (Kind.FOUND, Kind.UNCOUNTED))]
    total = float(-np.log(np.maximum(1 - wrong, _LEAST)).sum())
    lacking = np.flatnonzero(~verdict.has & ~shown.crowd)
    if len(lacking):
        at = (overlaps(every) >= 0.5) & (every.found[:, None] == every.labels[None])
        best = np.where(at, every.scores[:, None], 0.0).max(0, initial=0.0)
        total += float(-np.log(np.clip(best[lacking], _LEAST, 1.0)).sum())
    return total


def worst_images(
    observations: Sequence[Observation], judged: Mapping[str, Judged], most: int = WORST
) -> list[WorstImage]:
    """The images with the largest `surprise` of all datasets, worst first. Those that cannot be read are left out."""
    candidates = [
        _Candidate(dataset=number, row=row, surprise=surprise(*parts))
        for number, one in enumerate(observations)
        for row, parts in enumerate(
            zip(judged[one.dataset].every, judged[one.dataset].shown, judged[one.dataset].shown_verdicts, strict=True)
        )
    ]
    candidates = sorted((one for one in candidates if one.surprise > 0), key=lambda one: -one.surprise)
    images: list[WorstImage] = []
    for candidate in candidates:
        if len(images) == most:
            break
        observation = observations[candidate.dataset]
        record = observation.annotations[candidate.row]
        try:
            images.append(_image(observation, judged[observation.dataset], candidate, record))
        except DataError:
            continue
    return images


def _image(observation: Observation, judged: Judged, candidate: _Candidate, record: ImageRecord) -> WorstImage:
    pixels, record, _ = read_annotated(record)
    height, width = pixels.shape[:2]
    case, verdict = judged.shown[candidate.row], judged.shown_verdicts[candidate.row]
    names = judged.names
    truth = tuple(_truth(case, verdict, record, names, (width, height)))[:_MOST_MARKS]
    found = tuple(
        _box(
            case.boxes[row],
            (width, height),
            names[case.found[row]],
            float(case.scores[row]),
            *KINDS[Kind(int(verdict.kind[row]))],
        )
        for row in range(min(len(case.boxes), _MOST_MARKS))
    )
    return WorstImage(
        dataset=observation.dataset,
        name=said(record.path.name or str(record.image_id)),
        surprise=candidate.surprise,
        picture=picture(pixels, _LONGEST, _MOST_BYTES),
        truth=truth,
        found=found,
        remarks=tuple(_remarks(case, verdict, names)),
    )


def _truth(case: Case, verdict: Verdict, record: ImageRecord, names: Sequence[str], size: tuple[int, int]) -> list[Box]:
    """The annotated boxes. The case may have whole-image crowds besides, for what is not annotated exhaustively."""
    boxes = []
    for row, box in enumerate(case.objects):
        if case.crowd[row] and (box[2:] == (record.width, record.height)).all():
            continue
        kind, told = ("uncounted", "crowd") if case.crowd[row] else ("missed", "not found")
        if verdict.has[row]:
            kind, told = "found", "found"
        boxes.append(_box(box, size, names[case.labels[row]], None, kind, told))
    return boxes


def _box(box: np.ndarray, size: tuple[int, int], name: str, score: float | None, kind: str, told: str) -> Box:
    x, y, width, height = (float(side) for side in box)
    return Box(
        x=round(100 * x / size[0], 2),
        y=round(100 * y / size[1], 2),
        width=round(100 * width / size[0], 2),
        height=round(100 * height / size[1], 2),
        name=said(name),
        score=None if score is None else round(score, 2),
        kind=kind,
        told=told,
    )


def _remarks(case: Case, verdict: Verdict, names: Sequence[str]) -> list[str]:
    """What is wrong, in sentences, the surest first."""
    remarks: list[str] = []
    for row, kind in enumerate(verdict.kind.tolist()):
        name, about = said(names[case.found[row]]), int(verdict.about[row])
        what = f"{name} {case.scores[row]:.2f}"
        if kind == Kind.UNCOUNTED and about != NOBODY and not verdict.has[about]:
            remarks.append(f"{what}: annotated as {said(names[case.labels[about]])}")
        elif kind in (Kind.NAME, Kind.BOTH):
            where = "annotated as" if kind == Kind.NAME else "only near an annotated"
            remarks.append(f"{what}: {where} {said(names[case.labels[about]])}")
        elif kind == Kind.PLACE:
            remarks.append(f"{what}: the box is off")
        elif kind == Kind.DUPLICATE:
            remarks.append(f"{what}: found twice")
        elif kind == Kind.BACKGROUND:
            remarks.append(f"{what}: nothing is annotated there")
    missing: dict[str, int] = {}
    for row in np.flatnonzero(~verdict.has & ~case.crowd).tolist():
        missing[said(names[case.labels[row]])] = missing.get(said(names[case.labels[row]]), 0) + 1
    remarks += [f"not found: {name}" + (f", {number} times" if number > 1 else "") for name, number in missing.items()]
    more = len(remarks) - _MOST_REMARKS
    return [*remarks[:_MOST_REMARKS], f"and {more} more"] if more > 0 else remarks


def by_id(observation: Observation) -> dict[ImageId, ImageRecord]:
    """The records of those images whose presence was looked at."""
    every = (observation.annotations[row] for row in range(len(observation.annotations)))
    return {record.image_id: record for record in every if record.image_id in observation.presence}
