"""Which formats there are, and which of them a folder is."""

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from metr.data.containers.archives import archive_folders, archive_stem, is_archive
from metr.data.containers.huggingface import HuggingFaceReader
from metr.data.containers.tfrecord import TFRecordReader
from metr.data.formats.base import Reader
from metr.data.formats.bdd100k import Bdd100kReader
from metr.data.formats.coco import CocoReader
from metr.data.formats.coco_variants import LvisReader, Objects365Reader
from metr.data.formats.createml import CreateMLReader
from metr.data.formats.crowdhuman import CrowdHumanReader
from metr.data.formats.csv_boxes import CsvReader
from metr.data.formats.cvat import CvatReader
from metr.data.formats.datumaro import DatumaroReader
from metr.data.formats.dota import DotaReader
from metr.data.formats.files import expanded, glance, is_image, there
from metr.data.formats.imagefolder import ImageFolderReader
from metr.data.formats.kitti import KittiReader
from metr.data.formats.label_studio import LabelStudioReader
from metr.data.formats.labelme import LabelmeReader
from metr.data.formats.labelme_xml import LabelMeXmlReader
from metr.data.formats.mot import MotReader
from metr.data.formats.odvg import OdvgReader
from metr.data.formats.open_images import OpenImagesReader
from metr.data.formats.presence import no_such_dataset
from metr.data.formats.unread import find_unread
from metr.data.formats.via import ViaReader
from metr.data.formats.visdrone import VisDroneReader
from metr.data.formats.voc import VocReader
from metr.data.formats.wider_face import WiderFaceReader
from metr.data.formats.yolo import YoloReader
from metr.data.hub_datasets.address import HubAddress, is_hub_dataset
from metr.data.hub_datasets.fetched import fetch_dataset
from metr.data.shards.addresses import is_pattern
from metr.data.shards.reader import ShardReader, WebDatasetReader, open_pattern
from metr.data.shards.stores import is_url
from metr.errors import DataError, counted, did_you_mean

# A folder that fits several formats is read as the first of these: formats that declare their categories come before
# those that only use them, those that say more of each image before those that say less, variants of COCO before COCO.
READERS: tuple[type[Reader], ...] = (
    LvisReader,
    Objects365Reader,
    CocoReader,
    DatumaroReader,
    CvatReader,
    DotaReader,
    YoloReader,
    VisDroneReader,
    WiderFaceReader,
    MotReader,
    KittiReader,
    Bdd100kReader,
    CrowdHumanReader,
    OdvgReader,
    OpenImagesReader,
    ImageFolderReader,
    ViaReader,
    LabelStudioReader,
    CreateMLReader,
    LabelmeReader,
    LabelMeXmlReader,
    VocReader,
    CsvReader,
    HuggingFaceReader,
    TFRecordReader,
    WebDatasetReader,
)


def recognise(path: Path | str, format_name: str | None = None) -> Reader:
    """The reader of a dataset's folder, its one annotation file, or an archive of it, which is unpacked once.

    Args:
        path: The folder or file; a dataset on the Hugging Face hub, which is fetched; or the shards that a URL, or a
            path with braces or a glob, means.
        format_name: The format, where it is known; else it is recognised.

    Raises:
        DataError: there is no such path, it fits no format, or it is an archive that cannot be unpacked.
        StoreError: it is in a store or on the hub, which cannot be reached.
    """
    if is_hub_dataset(path):
        return _recognise_on_the_hub(str(path), format_name)
    if is_url(path):
        return open_pattern(path, format_name).prepared()
    path = _absolute(Path(path))
    if there(path):
        return _recognise_here(path, format_name)
    if is_pattern(path):
        return open_pattern(path, format_name).prepared()
    raise no_such_dataset(path)


def _recognise_on_the_hub(address: str, format_name: str | None) -> Reader:
    """The reader of a dataset on the hub, whose files are fetched.

    Raises:
        DataError, StoreError: it cannot be fetched, or fits no format.
    """
    fetched = fetch_dataset(HubAddress.parsed(address))
    try:
        return _recognise_here(fetched.folder, format_name)
    except DataError as error:  # about the folder of links, which people have not named
        where = address if error.where == fetched.folder else error.where
        raise DataError(error.what, where=where, hint=error.hint) from None


def _recognise_here(path: Path, format_name: str | None) -> Reader:
    """The reader of a folder or file of this machine.

    Raises:
        DataError: it fits no format, or is an archive that cannot be unpacked.
    """
    readers = [reader for reader in READERS if format_name in {None, reader.format}]
    if not readers:
        hint = did_you_mean(str(format_name), [reader.format for reader in READERS])
        raise DataError(f"unknown format {format_name!r}", where=path, hint=hint)
    packed = is_archive(path)
    if packed and format_name in {None, WebDatasetReader.format}:
        samples = WebDatasetReader.recognise(path)
        if samples is not None:
            return samples.prepared()
    if not packed and archive_stem(path) is not None and there(path, Path.is_file):
        raise DataError("called like an archive, but it is none: damaged or cut off", where=path, hint="fetch it again")
    places = archive_folders(path) if packed else [path]
    for place, reader in product(places, readers):
        found = reader.recognise(place)
        if found is not None:
            return found.prepared()
    unread = find_unread(places[0]) if format_name is None else None
    if unread is not None:
        raise DataError(f"found {unread.what}: METR cannot read that", where=path, hint=unread.way_out)
    almost = next(filter(None, (reader.why_not(places[0]) for reader in readers)), None)
    if almost is not None:
        raise DataError(almost, where=path, hint="rename its columns, or add those that are missing")
    what = f"no annotations of a known format ({_contents(places[0])})"
    raise DataError(what, where=path, hint=_layouts(readers))


def _layouts(readers: Sequence[type[Reader]]) -> str:
    """What the formats look like, in full if they are few; else the most common ones, and the names of the others."""
    shown = readers if len(readers) < len(READERS) else (CocoReader, YoloReader, VocReader, CsvReader)
    others = ", ".join(reader.format for reader in readers if reader not in shown)
    lines = ["one of these layouts", *(f"    {reader.looks_like}" for reader in shown)]
    return "\n".join([*lines, *([f"    also read, as their tools write them: {others}"] if others else [])])


def other_formats(reader: Reader, path: Path | str) -> list[str]:
    """The formats after the reader's own that a dataset fits as well. All folders are looked into: it takes a while."""
    if isinstance(reader, ShardReader) or is_hub_dataset(path):
        return []
    after = [other.format for other in READERS].index(reader.format) + 1
    return [other.format for other in READERS[after:] if _fits(other, _absolute(Path(path)))]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(expanded(path)))  # noqa: PTH100  (`..` goes, symbolic links stay)


def _fits(reader: type[Reader], path: Path) -> bool:
    try:
        return reader.recognise(path) is not None
    except DataError:
        return False


def _contents(path: Path) -> str:
    """What is found in place of a dataset, in a few words."""
    if path.is_file():
        return "a single file"
    entries = glance(path)
    if not entries:
        return "the folder is empty"
    folders = [entry.name for entry in entries if entry.is_dir()]
    images = sum(is_image(entry.name) for entry in entries)
    others = len(entries) - len(folders) - images
    packed = [entry.name for entry in entries if archive_stem(Path(entry.name)) is not None]
    if packed:
        return f"found {len(packed)} archives ({', '.join(packed[:5])}): name one of them, or unpack them all"
    named = f" ({', '.join(folders[:5])}{', ...' if len(folders) > 5 else ''})" if folders else ""
    return (
        f"found {counted(len(folders), 'folder')}{named}, {counted(images, 'image')}, {counted(others, 'other file')}"
    )
