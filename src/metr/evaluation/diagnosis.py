"""What is wrong with the detections on one dataset: error kinds, calibration, confusion between names.

Two sets of detections are looked at. *All* are those that average precision is made of, the 100 best of an image.
*Shown* are those that people see: over the threshold of their name, with one name for each place.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from metr.evaluation.coco import CocoScorer, OperatingPoint
from metr.evaluation.matching import NOBODY, Case, Kind, Verdict, all_names, cases, judge, paired
from metr.inference.postprocess import ImageId, ScoreThresholds
from metr.structures import Detections

ErrorName = Literal["name", "place", "both", "duplicate", "background", "missed"]
BINS = 10
"""Of the reliability diagram, of equal width."""
_RECALLS = np.linspace(0.0, 1.0, 101)
_KINDS: dict[ErrorName, Kind] = {
    "name": Kind.NAME,
    "place": Kind.PLACE,
    "both": Kind.BOTH,
    "duplicate": Kind.DUPLICATE,
    "background": Kind.BACKGROUND,
}


@dataclass(frozen=True, kw_only=True)
class ErrorShare:
    """One kind of error: wrong name, wrong place, both, duplicate, background, or a missed object.

    `lost` is the AP at IoU 0.5 (0 to 100, the mean over names) that would be gained if errors of this kind alone were
    mended, as TIDE defines it, over all detections. `shown` is how many of the shown detections are of this kind; of
    `missed`, how many objects no shown detection accounts for.
    """

    kind: ErrorName
    lost: float
    shown: int


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Detections whose score lies in [lower, upper), the last bin up to 1: their number, their mean score, and the
    fraction of them that are right (IoU at least 0.5). Both are None where there are none.
    """

    lower: float
    upper: float
    count: int
    score: float | None
    right: float | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How scores and hits agree, over all detections.

    `error` is the expected calibration error (Guo et al., ICML 2017; 0 to 1): the mean over detections of the distance
    between mean score and fraction of hits in their bin. `shown` is what people see; `best` the one score for all names
    from which F1 is highest. None without detections.
    """

    bins: tuple[Bin, ...]
    error: float | None
    shown: OperatingPoint | None = None
    best: OperatingPoint | None = None


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often objects of one name are shown with another name at their place (IoU at least 0.5).

    `pairs` are (name of the object, name shown, number), equal names included; names that the dataset does not have
    are other datasets'. `unseen` is the number of objects of each name at whose place nothing is shown. `invented` is
    the number of shown detections of each name that are at no object's place, where the dataset annotates the name.
    """

    pairs: tuple[tuple[str, str, int], ...]
    unseen: Mapping[str, int]
    invented: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class NameErrors:
    """The shown detections of one name, which is shown from the score `threshold` on.

    `found` of its `objects` are found; the other numbers count wrong detections of this name by kind.
    """

    name: str
    threshold: float
    objects: int
    found: int
    wrong_name: int
    wrong_place: int
    both: int
    duplicate: int
    background: int


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with the detections on one dataset. `names` has a row for each of its names."""

    errors: tuple[ErrorShare, ...]
    calibration: Calibration
    confusion: Confusion
    names: tuple[NameErrors, ...]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The images of one dataset with a verdict on all detections and one on the shown ones.

    Rows of the four lists belong together. `names` are what labels count, the dataset's `own` ones first.
    """

    names: tuple[str, ...]
    own: int
    every: tuple[Case, ...]
    verdicts: tuple[Verdict, ...]
    shown: tuple[Case, ...]
    shown_verdicts: tuple[Verdict, ...]

    @staticmethod
    def of(
        scorer: CocoScorer,
        detections: Mapping[ImageId, Detections],
        vocabulary: Sequence[str],
        thresholds: ScoreThresholds,
    ) -> "Judged":
        """Judges the detections of a dataset.

        Args:
            scorer: Knows the dataset's objects.
            detections: By image id.
            vocabulary: The names that were asked for.
            thresholds: From which scores detections are shown.
        """
        names = all_names(scorer, tuple(vocabulary))
        every = tuple(cases(scorer, detections, names))
        kept = {image_id: thresholds.shown(found) for image_id, found in detections.items()}
        shown = tuple(cases(scorer, kept, names))
        return Judged(
            names=names,
            own=len(scorer.categories),
            every=every,
            verdicts=tuple(map(judge, every)),
            shown=shown,
            shown_verdicts=tuple(map(judge, shown)),
        )


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """The counted detections of all images in a row, and the objects that they are about (`NOBODY`: none)."""

    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    kinds: Int[np.ndarray, "n"]
    about: Int[np.ndarray, "n"]
    object_labels: Int[np.ndarray, "m"]
    real: Bool[np.ndarray, "m"]
    has: Bool[np.ndarray, "m"]

    @staticmethod
    def of(images: Sequence[Case], verdicts: Sequence[Verdict]) -> "_Pool":
        starts = np.cumsum([0, *(len(case.objects) for case in images)])
        rows = [verdict.kind != Kind.UNCOUNTED for verdict in verdicts]
        about = [
            np.where(one.about == NOBODY, NOBODY, one.about + start)
            for one, start in zip(verdicts, starts[:-1], strict=True)
        ]

        def joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
            return np.concatenate([np.zeros(0, dtype=kind), *parts]).astype(kind)

        return _Pool(
            scores=joined([case.scores[keep] for case, keep in zip(images, rows, strict=True)], float),
            labels=joined([case.found[keep] for case, keep in zip(images, rows, strict=True)], np.int64),
            kinds=joined([one.kind[keep] for one, keep in zip(verdicts, rows, strict=True)], np.int64),
            about=joined([one[keep] for one, keep in zip(about, rows, strict=True)], np.int64),
            object_labels=joined([case.labels for case in images], np.int64),
            real=joined([~case.crowd for case in images], bool),
            has=joined([one.has for one in verdicts], bool),
        )

    def objects(self, names: int) -> Int[np.ndarray, "v"]:
        """How many objects each name has."""
        return np.bincount(self.object_labels[self.real], minlength=names)


def diagnose(judged: Judged, thresholds: ScoreThresholds) -> Diagnosis:
    """The diagnosis of the detections on one dataset."""
    return Diagnosis(
        errors=_errors(judged),
        calibration=_calibration(judged, thresholds),
        confusion=_confusion(judged),
        names=_name_errors(judged, thresholds),
    )


def precision_curves(judged: Judged) -> Float[np.ndarray, "v 101"]:
    """Precision (0 to 1) of each of the dataset's names at recall 0, 0.01, ... 1 and IoU 0.5, as the protocol has it.

    It is the best precision at this recall or a higher one; nan for a name without objects. The mean of a row is the
    name's AP50.
    """
    pool = _Pool.of(judged.every, judged.verdicts)
    counts = pool.objects(judged.own)
    rows = [
        _curve(pool.scores[pool.labels == name], pool.kinds[pool.labels == name] == Kind.FOUND, int(count))
        for name, count in enumerate(counts[: judged.own])
    ]
    return np.array(rows, dtype=np.float64).reshape(judged.own, len(_RECALLS))


def _curve(scores: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], objects: int) -> Float[np.ndarray, "101"]:
    if not objects:
        return np.full(len(_RECALLS), np.nan)
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / objects, _RECALLS, side="left")
    return np.append(envelope, 0.0)[np.minimum(places, len(envelope))]


def _mean_ap(
    scores: Float[np.ndarray, "n"],
    labels: Int[np.ndarray, "n"],
    right: Bool[np.ndarray, "n"],
    objects: Int[np.ndarray, "v"],
) -> float:
    """The mean AP50 (0 to 100) of the names that have objects; 0 where no name has any."""
    values = [
        float(_curve(scores[labels == name], right[labels == name], int(count)).mean())
        for name, count in enumerate(objects)
        if count
    ]
    return 100 * sum(values) / len(values) if values else 0.0


def _errors(judged: Judged) -> tuple[ErrorShare, ...]:
    """What each kind of error costs. Mended, a wrong name or place becomes right if its object has not been found and
    no better detection of both kinds is about it; else it goes, as all other wrong detections do.
    """
    pool = _Pool.of(judged.every, judged.verdicts)
    counts, right = pool.objects(judged.own), pool.kinds == Kind.FOUND
    base = _mean_ap(pool.scores, pool.labels, right, counts)
    chosen = _best_mended(pool)
    shown = Counter(int(kind) for verdict in judged.shown_verdicts for kind in verdict.kind)
    shares = []
    for name, kind in _KINDS.items():
        of_kind = pool.kinds == kind
        stays = ~of_kind | chosen
        labels = np.where(
            of_kind & chosen, pool.object_labels[pool.about] if len(pool.object_labels) else 0, pool.labels
        )
        mended = _mean_ap(pool.scores[stays], labels[stays], (right | (of_kind & chosen))[stays], counts)
        shares.append(ErrorShare(kind=name, lost=max(mended - base, 0.0), shown=shown[int(kind)]))
    accounted = np.unique(pool.about[np.isin(pool.kinds, (Kind.NAME, Kind.PLACE))])
    missed = pool.real & ~pool.has
    missed[accounted] = False
    left = counts - np.bincount(pool.object_labels[missed], minlength=judged.own)
    gain = max(_mean_ap(pool.scores, pool.labels, right, left) - base, 0.0)
    lacking = sum(int(verdict.missed.sum()) for verdict in judged.shown_verdicts)
    return (*shares, ErrorShare(kind="missed", lost=gain, shown=lacking))


def _best_mended(pool: _Pool) -> Bool[np.ndarray, "n"]:
    """Of the detections with a wrong name or place, the best one about each object that has not been found."""
    chosen = np.zeros(len(pool.scores), dtype=bool)
    rows = np.flatnonzero(np.isin(pool.kinds, (Kind.NAME, Kind.PLACE)) & (pool.about != NOBODY))
    rows = rows[~pool.has[pool.about[rows]]]
    order = rows[np.argsort(-pool.scores[rows], kind="stable")]
    _, first = np.unique(pool.about[order], return_index=True)
    chosen[order[first]] = True
    return chosen


def _calibration(judged: Judged, thresholds: ScoreThresholds) -> Calibration:
    pool = _Pool.of(judged.every, judged.verdicts)
    edges = np.linspace(0.0, 1.0, BINS + 1)
    place = np.minimum((pool.scores * BINS).astype(np.int64), BINS - 1)
    right = pool.kinds == Kind.FOUND
    bins, error = [], 0.0
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        score = float(pool.scores[inside].mean()) if count else None
        hits = float(right[inside].mean()) if count else None
        lower, upper = round(float(edges[number]), 2), round(float(edges[number + 1]), 2)
        bins.append(Bin(lower=lower, upper=upper, count=count, score=score, right=hits))
        if score is not None and hits is not None:
            error += count * abs(score - hits)
    total = len(pool.scores)
    if not total:
        return Calibration(bins=tuple(bins), error=None)
    shown = _point(_Pool.of(judged.shown, judged.shown_verdicts), _least_shown(judged, thresholds))
    return Calibration(bins=tuple(bins), error=error / total, shown=shown, best=_best_point(pool))


def _least_shown(judged: Judged, thresholds: ScoreThresholds) -> float:
    """The lowest of the thresholds of the dataset's own names; alike unless datasets share names or some are new."""
    own = judged.names[: judged.own]
    return min((thresholds.names.get(name, thresholds.default) for name in own), default=thresholds.default)


def _point(pool: _Pool, threshold: float) -> OperatingPoint:
    """Precision and recall of all detections together; both are 0 where nothing is found."""
    hits, objects = int((pool.kinds == Kind.FOUND).sum()), int(pool.real.sum())
    precision, recall = 100 * hits / max(len(pool.kinds), 1), 100 * hits / max(objects, 1)
    return OperatingPoint(threshold=threshold, precision=precision, recall=recall)


def _best_point(pool: _Pool) -> OperatingPoint:
    """The score, one for all names, from which F1 of all detections is highest."""
    order = np.argsort(-pool.scores, kind="stable")
    scores, hits = pool.scores[order], np.cumsum(pool.kinds[order] == Kind.FOUND)
    number, objects = np.arange(1, len(scores) + 1), int(pool.real.sum())
    f1 = np.where(np.append(scores[1:] < scores[:-1], True), 2 * hits / (number + objects), -1.0)
    at = int(f1.argmax())
    precision, recall = 100 * hits[at] / number[at], 100 * hits[at] / max(objects, 1)
    return OperatingPoint(threshold=float(scores[at]), precision=float(precision), recall=float(recall))


def _confusion(judged: Judged) -> Confusion:
    pairs: Counter[tuple[int, int]] = Counter()
    unseen: Counter[int] = Counter()
    invented: Counter[int] = Counter()
    for case, verdict in zip(judged.shown, judged.shown_verdicts, strict=True):
        found = paired(case)
        pairs.update((int(case.labels[thing]), int(case.found[row])) for row, thing in found)
        seen = {thing for _, thing in found}
        unseen.update(
            int(label) for number, label in enumerate(case.labels) if not case.crowd[number] and number not in seen
        )
        at = {row for row, _ in found}
        wrong = np.flatnonzero(~np.isin(verdict.kind, (Kind.FOUND, Kind.UNCOUNTED))).tolist()
        invented.update(int(case.found[row]) for row in wrong if row not in at)
    names = judged.names
    return Confusion(
        pairs=tuple((names[true], names[said], number) for (true, said), number in sorted(pairs.items())),
        unseen={names[label]: number for label, number in sorted(unseen.items())},
        invented={names[label]: number for label, number in sorted(invented.items())},
    )


def _name_errors(judged: Judged, thresholds: ScoreThresholds) -> tuple[NameErrors, ...]:
    pool = _Pool.of(judged.shown, judged.shown_verdicts)
    counts = pool.objects(judged.own)

    def number(kind: Kind) -> Callable[[int], int]:
        rows = np.bincount(pool.labels[pool.kinds == kind], minlength=judged.own)
        return lambda name: int(rows[name])

    found, name, place = number(Kind.FOUND), number(Kind.NAME), number(Kind.PLACE)
    both, duplicate, background = number(Kind.BOTH), number(Kind.DUPLICATE), number(Kind.BACKGROUND)
    return tuple(
        NameErrors(
            name=spelling,
            threshold=thresholds.names.get(spelling, thresholds.default),
            objects=int(counts[row]),
            found=found(row),
            wrong_name=name(row),
            wrong_place=place(row),
            both=both(row),
            duplicate=duplicate(row),
            background=background(row),
        )
        for row, spelling in enumerate(judged.names[: judged.own])
    )
