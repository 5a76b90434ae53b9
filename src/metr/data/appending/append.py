"""Adds boxes to files of any format that has a way for it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from metr.data.appending.base import Addition, Appending, CannotAppendError
from metr.data.appending.json_files import append_to_coco, append_to_label_studio, append_to_labelme
from metr.data.appending.text_files import append_to_csv, append_to_yolo
from metr.data.appending.xml_files import append_to_cvat, append_to_voc
from metr.data.formats.base import Reader


def append(reader: Reader, root: Path, additions: Sequence[Addition], images: Mapping[str, str]) -> None:
    """Adds boxes to the annotation files in `root`, which are a copy of those of a dataset.

    Args:
        reader: Reads the dataset that was copied.
        root: The copy of its folder; its annotation files are no links.
        additions: The boxes, at most one for each image.
        images: The place of the annotations of each image of the dataset by its path, as the reader says.

    Raises:
        CannotAppendError: the format or its dialect is none that boxes can be added to.
    """
    if reader.format not in _APPENDERS:
        raise CannotAppendError(f"boxes cannot be added to files of the format {reader.format}")
    if not additions:
        return
    try:
        _APPENDERS[reader.format](Appending(reader=reader, root=root, additions=tuple(additions), images=images))
    except CannotAppendError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:  # odd files
        raise CannotAppendError(f"written otherwise than expected ({type(error).__name__}: {error})") from None


_APPENDERS: Mapping[str, Callable[[Appending], None]] = {
    "coco": append_to_coco,
    "yolo": append_to_yolo,
    "voc": append_to_voc,
    "labelme": append_to_labelme,
    "csv": append_to_csv,
    "cvat": append_to_cvat,
    "label_studio": append_to_label_studio,
}
