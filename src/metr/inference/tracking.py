"""The same object in successive frames: a number for each, after ByteTrack (Zhang et al., 2022, arXiv 2110.06864)."""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from metr.boxes import pairwise_iou
from metr.config import Config
from metr.structures import Detections

__all__ = ["Tracker", "TrackingConfig"]

# deviations of the motion model, as fractions of a box's mean side: of a place, of a speed, and how each drifts a frame
_PLACE, _SPEED, _PLACE_DRIFT, _SPEED_DRIFT = 0.05, 0.1, 0.03, 0.012


class TrackingConfig(Config):
    """How detections become tracks."""

    weakest: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Score from which a weak detection may continue a track that no confident one continues."""
    min_iou: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Least IoU of a confident detection with where a track is expected."""
    weak_iou: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The same for a weak detection."""
    lost_seconds: Annotated[float, Field(ge=0)] = 1.0
    """How long a track that is not seen is waited for."""


@dataclass(kw_only=True)
class _Track:
    """An object: what a Kalman filter knows of the centre and size of its box, and of their speed a frame.

    `state` [4 2] are values and speeds, `spread` [4 2 2] their covariances: the four do not depend on each other.
    """

    label: int
    state: Float[np.ndarray, "4 2"]
    spread: Float[np.ndarray, "4 2 2"]
    number: int | None = None
    unseen: int = 0

    @classmethod
    def begun(cls, label: int, box: Float[np.ndarray, "4"]) -> "_Track":
        side = _side(box)
        spread = np.zeros((4, 2, 2))
        spread[:, 0, 0], spread[:, 1, 1] = (2 * _PLACE * side) ** 2, (_SPEED * side) ** 2
        return cls(label=label, state=np.stack([_centred(box), np.zeros(4)], axis=1), spread=spread)

    @property
    def box(self) -> Float[np.ndarray, "4"]:
        """Where it is expected: xyxy in pixels."""
        across, down, width, height = self.state[:, 0]
        width, height = max(width, 1.0), max(height, 1.0)
        return np.array([across - width / 2, down - height / 2, across + width / 2, down + height / 2])

    def advance(self) -> None:
        """One frame passes."""
        step, side = np.array([[1.0, 1.0], [0.0, 1.0]]), _side(self.box)
        if self.unseen:  # its size stays as it was last seen
            self.state[2:, 1] = 0
        drift = np.diag([(_PLACE_DRIFT * side) ** 2, (_SPEED_DRIFT * side) ** 2])
        self.state = self.state @ step.T
        self.spread = step @ self.spread @ step.T + drift
        self.unseen += 1

    def see(self, box: Float[np.ndarray, "4"]) -> None:
        """It is seen at a place."""
        noise = (_PLACE * _side(box)) ** 2
        gain = self.spread[:, :, 0] / (self.spread[:, 0, 0] + noise)[:, None]
        self.state = self.state + gain * (_centred(box) - self.state[:, 0])[:, None]
        self.spread = self.spread - gain[:, :, None] * self.spread[:, None, 0, :]
        self.unseen = 0


@dataclass
class Tracker:
    """Numbers the objects of a video; memory does not grow with the number of frames.

    A track continues with a detection of its own name near where it is expected: confident ones first, then weak ones.
    A new object gets its number in the second frame in which it is seen, those of the first frame at once.

    Args:
        frame_rate: Frames a second.
        config: The thresholds.
    """

    frame_rate: float = 25.0
    config: TrackingConfig = field(default_factory=TrackingConfig)
    _tracks: list[_Track] = field(default_factory=list, init=False)
    _numbered: int = field(default=0, init=False)
    _began: bool = field(default=False, init=False)

    def update(self, found: Detections, confident: Bool[np.ndarray, "q"]) -> list[int | None]:
        """The number of the object of each detection of the next frame; None for those that belong to none.

        Args:
            found: The detections, weak ones included.
            confident: Which of them may begin a track.
        """
        boxes, labels = found.boxes.double().numpy(), found.labels.numpy()
        weak = ~confident & (found.scores.numpy() >= self.config.weakest)
        for track in self._tracks:
            track.advance()
        numbers: list[int | None] = [None] * len(boxes)
        free = self._continued(self._tracks, boxes, labels, confident, numbers, self.config.min_iou)
        seen_lately = [track for track in free if track.unseen == 1 and track.number is not None]
        self._continued(seen_lately, boxes, labels, weak, numbers, self.config.weak_iou)
        patience = 1 + round(self.config.lost_seconds * self.frame_rate)
        self._tracks = [one for one in self._tracks if one.unseen <= (patience if one.number is not None else 0)]
        return numbers

    def _continued(
        self,
        tracks: list[_Track],
        boxes: Float[np.ndarray, "q 4"],
        labels: Int[np.ndarray, "q"],
        chosen: Bool[np.ndarray, "q"],
        numbers: list[int | None],
        least: float,
    ) -> list[_Track]:
        """Continues tracks with the chosen detections, begins others if these are confident; the tracks left over."""
        rows = np.flatnonzero(chosen)
        expected = np.array([track.box for track in tracks]).reshape(-1, 4)
        overlaps = pairwise_iou(torch.from_numpy(expected), torch.from_numpy(boxes[rows])).numpy()
        overlaps[np.array([track.label for track in tracks], dtype=int)[:, None] != labels[rows][None]] = 0
        matched, taken = set[int](), set[int]()
        for at, column in zip(*linear_sum_assignment(overlaps, maximize=True), strict=True):
            if overlaps[at, column] > max(least, 0.0):
                tracks[at].see(boxes[rows[column]])
                numbers[rows[column]] = self._number(tracks[at])
                matched.add(int(at))
                taken.add(int(column))
        left = [track for at, track in enumerate(tracks) if at not in matched]
        if tracks is self._tracks:
            self._begin(
                [row for column, row in enumerate(rows.tolist()) if column not in taken], boxes, labels, numbers
            )
        return left

    def _begin(
        self,
        rows: list[int],
        boxes: Float[np.ndarray, "q 4"],
        labels: Int[np.ndarray, "q"],
        numbers: list[int | None],
    ) -> None:
        for row in rows:
            track = _Track.begun(int(labels[row]), boxes[row])
            self._tracks.append(track)
            if not self._began:
                numbers[row] = self._number(track)
        self._began = True

    def _number(self, track: _Track) -> int:
        if track.number is None:
            self._numbered += 1
            track.number = self._numbered
        return track.number


def _centred(box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
    left, top, right, bottom = box
    return np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])


def _side(box: Float[np.ndarray, "4"]) -> float:
    return max(1.0, float(box[2] - box[0] + box[3] - box[1]) / 2)
