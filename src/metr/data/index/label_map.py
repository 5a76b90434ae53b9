"""From the labels in a file of annotations to the categories of a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from metr.data.records import UNNAMED


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Maps the labels in a file to the dataset's `categories`.

    `rows[label]` is the category's index, -1 for a name that was dropped. `annotated` are the categories that are
    annotated exhaustively in every image, whatever the file says; None leaves this to the file. `regions` are the
    labels whose boxes are regions where nothing is known: they become ignored boxes of every category. Boxes of other
    dropped names are left out. `unknown_names` are names of which nothing is known in any image: those that a user
    dropped or ignores.
    """

    categories: tuple[str, ...]
    rows: Int[np.ndarray, "n"]
    annotated: tuple[int, ...] | None = None
    regions: tuple[int, ...] = ()
    unknown_names: tuple[str, ...] = ()

    @cached_property
    def is_region(self) -> Bool[np.ndarray, "n"]:
        """Whether the boxes of each label are regions where nothing is known."""
        return np.isin(np.arange(len(self.rows)), self.regions)

    @classmethod
    def identity(cls, categories: Sequence[str]) -> "LabelMap":
        """The labels are the categories' indices already."""
        return cls(categories=tuple(categories), rows=np.arange(len(categories)))

    def annotated_by(self, labels: Sequence[int] | None, unknown: Sequence[int] = ()) -> tuple[int, ...] | None:
        """The categories that are annotated exhaustively in one image.

        A category that several labels were merged into is annotated if all of them are and none is unknown. None is
        where an unknown label has no name.

        Args:
            labels: The labels that the file says are annotated exhaustively in the image; None means all.
            unknown: The labels of boxes that were dropped from the image.
        """
        if UNNAMED in unknown:
            return ()
        annotated = self._declared(labels)
        doubtful = {int(self.rows[label]) for label in unknown} - {-1}
        if not doubtful:
            return annotated
        every = range(len(self.categories)) if annotated is None else annotated
        return tuple(row for row in every if row not in doubtful)

    def _declared(self, labels: Sequence[int] | None) -> tuple[int, ...] | None:
        if self.annotated is not None or labels is None:
            return self.annotated
        merged = np.bincount(self.rows[self.rows >= 0], minlength=len(self.categories))
        rows = self.rows[list(labels)]
        found = np.bincount(rows[rows >= 0], minlength=len(self.categories))
        return tuple(np.flatnonzero((found == merged) & (merged > 0)).tolist())
