"""Annotations of images as viewers show them, also where the files mean the pixels as stored."""

from collections.abc import Sequence
from dataclasses import dataclass

from metr.data.images import exif_oriented_record
from metr.data.records import Annotations, DataIssue, ImageRecord


@dataclass(frozen=True)
class ExifOriented:
    """A split whose boxes are turned with their images, as those are read: what detections are compared with.

    Each record that is asked for costs a look at its image's header.
    """

    whole: Annotations

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.whole.name

    @property
    def split(self) -> str:
        """Which part of the dataset this is."""
        return self.whole.split

    @property
    def format(self) -> str:
        """What the files are written in."""
        return self.whole.format

    @property
    def categories(self) -> tuple[str, ...]:
        """Names, in the order of `ImageRecord.labels`."""
        return self.whole.categories

    @property
    def issues(self) -> Sequence[DataIssue]:
        """What reading went past."""
        return self.whole.issues

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of image `index`."""
        return exif_oriented_record(self.whole[index])
