"""Scores that say how likely a detection is right: Platt scaling of each name's score (Platt, 1999), fitted on val.

A detection is right if the COCO protocol gives it an object at IoU 0.5. Each score s becomes
sigmoid(scale * logit(s) + shift), which keeps the order of a name's detections and so its AP.

From such scores follows the one from which a dataset's detections are shown: half of the best F1 that they promise
(Lipton et al., 2014, arXiv 1402.1892).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize

from metr.config import Calibration
from metr.evaluation.coco import CocoScorer
from metr.evaluation.matching import Kind, all_names, cases, judge
from metr.inference.postprocess import ImageId
from metr.structures import Detections

_AS_IT_IS: Calibration = (1.0, 0.0)
# how much scale and shift lean on those of all names: a squared distance of 1 costs as much as so many nats
_LEANING = 5.0
_LIMITS = ((0.05, 20.0), (-20.0, 20.0))
_EPS = 1e-6
# what a dataset's detections are shown from is not below this, however weak the detector is
_LEAST_SHOWN = 0.1


@dataclass(frozen=True, kw_only=True)
class FittedScores:
    """What makes the scores of a dataset's names probabilities, and the one from which detections are shown.

    Attributes:
        calibration: Scale and shift by name; empty where no detection is right.
        threshold: The calibrated score, 0.1 to 0.5, one for all names; None where no detection is right.
    """

    calibration: Mapping[str, Calibration]
    threshold: float | None = None


def fit_scores(
    scorer: CocoScorer,
    detections: Mapping[ImageId, Detections],
    vocabulary: tuple[str, ...],
    applied: Mapping[str, Calibration] | None = None,
) -> FittedScores:
    """Scale and shift of each name of a dataset, and the score from which its detections are shown.

    Those of all names together are fitted first. A name's own lean on them, and are them where it has no object.

    Args:
        scorer: Knows the objects.
        detections: By image id.
        vocabulary: The names that were asked for.
        applied: What the scores have gone through already. It is undone, so that the result stands in its place.
    """
    names = all_names(scorer, vocabulary)
    logits, labels, right = _answers(scorer, detections, names)
    if len(logits):
        scale, shift = np.array([(applied or {}).get(name, _AS_IT_IS) for name in names])[labels].T
        logits = (logits - shift) / scale
    if not right.any():
        return FittedScores(calibration={})
    every = _fitted(logits, right, _AS_IT_IS)
    present = {one["category_id"] - 1 for one in scorer.truth["annotations"] if not one["iscrowd"]}
    own = {row: _fitted(logits[labels == row], right[labels == row], every) for row in present}
    scales, shifts = np.array([own.get(row, every) for row in range(len(names))])[labels].T
    return FittedScores(
        calibration={name: own.get(row, every) for row, name in enumerate(scorer.categories)},
        threshold=_threshold(1 / (1 + np.exp(-(scales * logits + shifts))), scorer),
    )


def _threshold(scores: Float[np.ndarray, "n"], scorer: CocoScorer) -> float:
    """Half of the best F1 that calibrated scores promise, which is the score from which they promise it.

    Unlike the score of the best F1 that was found, it rests on all detections and not on a few right ones.
    """
    objects = sum(not one["iscrowd"] for one in scorer.truth["annotations"])
    hits = np.cumsum(np.sort(scores)[::-1])
    best = float((2 * hits / (np.arange(1, len(scores) + 1) + objects)).max())
    return round(min(max(best / 2, _LEAST_SHOWN), 0.5), 2)


def mean_by_objects(several: Iterable[tuple[tuple[float, ...], int]]) -> tuple[float, ...]:
    """The mean of calibrations or thresholds, weighted by numbers of objects; where all are 0, each counts alike."""
    pairs = list(several)
    weights = [number for _, number in pairs]
    return tuple(np.average([one for one, _ in pairs], axis=0, weights=weights if any(weights) else None).tolist())


def _answers(
    scorer: CocoScorer, detections: Mapping[ImageId, Detections], names: tuple[str, ...]
) -> tuple[Float[np.ndarray, "n"], np.ndarray, Bool[np.ndarray, "n"]]:
    """Logit, label and whether it is right of every detection that counts."""
    scores, labels, right = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
    for case in cases(scorer, detections, names):
        kind = judge(case).kind
        counted = kind != Kind.UNCOUNTED
        scores.append(case.scores[counted])
        labels.append(case.found[counted])
        right.append(kind[counted] == Kind.FOUND)
    clipped = np.clip(np.concatenate(scores), _EPS, 1 - _EPS)
    return np.log(clipped / (1 - clipped)), np.concatenate(labels), np.concatenate(right)


def _fitted(logits: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], start: Calibration) -> Calibration:
    """Scale and shift of the highest likelihood that stay near `start`."""
    near = np.array(start)

    def cost(values: Float[np.ndarray, "2"]) -> tuple[float, Float[np.ndarray, "2"]]:
        moved, away = values[0] * logits + values[1], values - near
        wrong = 1 / (1 + np.exp(-moved)) - right
        gradient = np.array([(wrong * logits).sum(), wrong.sum()]) + 2 * _LEANING * away
        return float(np.logaddexp(0, moved).sum() - moved[right].sum() + _LEANING * (away**2).sum()), gradient

    scale, shift = minimize(cost, near, jac=True, method="L-BFGS-B", bounds=_LIMITS).x.tolist()
    return round(scale, 4), round(shift, 4)
