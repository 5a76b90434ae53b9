"""Scores that say how likely a detection is right: Platt scaling of each name's score (Platt, 1999), fitted on val.

A detection is right if the COCO protocol gives it an object at IoU 0.5. Each score s becomes
sigmoid(scale * logit(s) + shift), which keeps the order of a name's detections and so its AP.
"""

from collections.abc import Iterable, Mapping

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


def fit_calibration(
    scorer: CocoScorer,
    detections: Mapping[ImageId, Detections],
    vocabulary: tuple[str, ...],
    applied: Mapping[str, Calibration] | None = None,
) -> dict[str, Calibration]:
    """Scale and shift of each name of a dataset; nothing where no detection is right.

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
        return {}
    every = _fitted(logits, right, _AS_IT_IS)
    present = {one["category_id"] - 1 for one in scorer.truth["annotations"] if not one["iscrowd"]}
    own = {row: _fitted(logits[labels == row], right[labels == row], every) for row in present}
    return {name: own.get(row, every) for row, name in enumerate(scorer.categories)}


def mean_calibration(several: Iterable[tuple[Calibration, int]]) -> Calibration:
    """The mean of calibrations, weighted by these numbers of objects; where all are 0, each counts alike."""
    pairs = list(several)
    weights = [number for _, number in pairs]
    scale, shift = np.average([one for one, _ in pairs], axis=0, weights=weights if any(weights) else None).tolist()
    return scale, shift


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
