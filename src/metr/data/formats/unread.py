"""What people have that is not read: what it is, and the way out."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from metr.data.formats.files import files_in, folders_in, folders_within, glance, is_image, text_start_of, there
from metr.data.formats.json_lines import first_keys, starts_like
from metr.data.records import canonical_split

_DEPTH = 3
# Files of a kind that are looked into, in each folder.
_SNIFFED = 5
_SNIFF_BYTES = 1 << 16
_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_MASKS = re.compile(
    r"(^|[^a-z])(masks?|segmentation\w*|annotations?|labels?|gt|ground_?truth)([^a-z]|$)", re.IGNORECASE
)
_LABEL_FILES = (".json", ".jsonl", ".ndjson", ".xml", ".csv", ".txt", ".yaml", ".yml", ".parquet", ".odgt")


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Data that is not read.

    `what` completes "found ...", `way_out` says what to do, `is_there` looks for it in a folder or at a file.
    """

    what: str
    way_out: str
    is_there: Callable[[Path], bool]


def find_unread(path: Path) -> Unread | None:
    """What a folder or file is, if it is of a kind that is known but not read."""
    return next((kind for kind in _KINDS if kind.is_there(path)), None)


def _files(path: Path, *suffixes: str) -> Iterator[Path]:
    """The first files of a kind in each folder, or the one file that a path is."""
    if path.is_file():
        yield from [path] if path.suffix.lower() in suffixes else []
        return
    for folder in folders_within(path, _DEPTH):
        yield from islice(files_in(folder, *suffixes), _SNIFFED)


def _json(opening: bytes, *keys: str) -> Callable[[Path], bool]:
    """Looks for a JSON file with these keys."""
    return lambda path: any(starts_like(file, opening, *keys) for file in _files(path, ".json"))


def _is_supervisely(path: Path) -> bool:
    files = list(_files(path, ".json"))
    described = any(file.name == "meta.json" and starts_like(file, b"{", "classes") for file in files)
    return described or any(starts_like(file, b"{", "classTitle|classId", "objects") for file in files)


def _is_labelbox(path: Path) -> bool:
    return any("data_row" in keys for file in _files(path, ".ndjson", ".jsonl", ".json") for keys in first_keys(file))


def _is_cvat_video(path: Path) -> bool:
    heads = (text_start_of(file, _SNIFF_BYTES) for file in _files(path, ".xml"))
    return any(re.search(rb"<annotations[\s>]", head) and re.search(rb"<track\s", head) for head in heads)


def _is_videos(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() in _VIDEOS
    folders = list(folders_within(path, 1))
    return any(files_in(folder, *_VIDEOS) for folder in folders) and not any(map(_images_in, folders))


def _is_classification(path: Path) -> bool:
    """Whether there is a folder of images for each class, in those of splits or not, and no file describes them."""
    tops = folders_in(path)
    splits = [folder for folder in tops if canonical_split(folder.name)]
    classes = [folder for split in splits for folder in folders_in(split)] if splits else tops
    with_images = [folder for folder in classes if _images_in(folder)]
    return len({folder.name for folder in with_images}) > 1 and len(with_images) == len(classes) and _bare(path)


def _is_masks(path: Path) -> bool:
    folders = list(folders_within(path, _DEPTH))
    masks = [folder for folder in folders if _MASKS.search(folder.name) and _images_in(folder)]
    others = [folder for folder in folders if folder not in masks and _images_in(folder)]
    return bool(masks and others) and _bare(path)


def _bare(path: Path) -> bool:
    """Whether a folder has no file that could hold annotations, but for words about it."""
    files = (file for folder in folders_within(path, _DEPTH) for file in files_in(folder, *_LABEL_FILES))
    return all(re.match(r"(readme|licen[cs]e|classes|names|labels)", file.name.lower()) for file in files)


def _images_in(folder: Path) -> bool:
    return there(folder, Path.is_dir) and any(is_image(entry.name) for entry in glance(folder))


# In this order: what is certain first.
_KINDS = (
    Unread(what="a Supervisely project", way_out="export it as COCO from Supervisely", is_there=_is_supervisely),
    Unread(
        what="V7 Darwin JSON",
        way_out="convert it with V7's own tool: darwin convert coco FILES OUT",
        is_there=_json(b"{", "item", "annotations", "version|schema_ref"),
    ),
    Unread(
        what="a Labelbox export",
        way_out="convert it to COCO, for instance with Labelbox's Python package",
        is_there=_is_labelbox,
    ),
    Unread(
        what="an export of Scale AI tasks",
        way_out="convert it to COCO: left, top, width and height of a response are a COCO bbox",
        is_there=_json(b"[", "task_id", "response|params"),
    ),
    Unread(
        what="CVAT for video",
        way_out='export the task from CVAT as "CVAT for images 1.1" or as COCO, with its images',
        is_there=_is_cvat_video,
    ),
    Unread(
        what="a project of VGG Image Annotator 3",
        way_out="annotate in VIA 2, which exports CSV, JSON and COCO, or convert it to COCO",
        is_there=_json(b"{", "project", "attribute", "metadata", "view"),
    ),
    Unread(
        what="BDD100K with a JSON file for each image",
        way_out="take det_20/det_train.json or bdd100k_labels_images_train.json, which hold the same boxes",
        is_there=_json(b"{", "name", "frames", "objects"),
    ),
    Unread(
        what="videos",
        way_out="save frames as images (ffmpeg -i VIDEO -r 1 frame_%05d.jpg), and draw boxes on them",
        is_there=_is_videos,
    ),
    Unread(
        what="masks without boxes",
        way_out="write the box around each object of the masks as COCO; METR learns from boxes",
        is_there=_is_masks,
    ),
    Unread(
        what="folders of images without boxes, perhaps one for each class",
        way_out="draw boxes, for instance with labelme, CVAT or Label Studio; METR learns where objects are",
        is_there=_is_classification,
    ),
)
