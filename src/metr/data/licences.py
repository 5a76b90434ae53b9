"""Licences of datasets as their files declare them: repeated, not judged. Declarations may contradict each other."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from metr.data.datasets_file import DatasetSource
from metr.data.formats.files import start_of
from metr.data.formats.imagefolder import card_header
from metr.data.formats.json_pieces import Value, values_of
from metr.data.formats.registry import recognise
from metr.data.records import Annotations
from metr.errors import DataError

_logger = logging.getLogger(__name__)
_LONGEST = 300  # characters of a declaration
_LARGEST = 1 << 20  # bytes of a metadata file that are read
_PIECE_BYTES = 1 << 24
# The hub's card, the description of a YOLO dataset, and what the library `datasets` writes.
_METADATA = ("README.md", "data.yaml", "dataset.yaml", "dataset_info.json")
_COCO = frozenset({"coco", "lvis", "objects365"})


class Licence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One declaration of a dataset's licence.

    `stated_in` is the file that declares it, relative to the dataset's folder. `images` is the number of images that it
    is declared for; None is the dataset as a whole.
    """

    text: str
    stated_in: str
    url: str | None = None
    images: int | None = None


class _CocoLicence(msgspec.Struct):
    """A licence as COCO's files list it."""

    id: int | str
    name: str | None = None
    url: str | None = None


class _CocoImage(msgspec.Struct, gc=False):
    """An image as COCO's files list it."""

    file_name: str
    license: int | str | None = None


_Entry = TypeVar("_Entry", _CocoLicence, _CocoImage)


def licences_of(source: DatasetSource, images: Annotations) -> tuple[Licence, ...]:
    """The licences that a dataset's files declare; none where they declare none.

    Read are the key `license` of the dataset's card, of the description of a YOLO dataset (also as Roboflow writes it)
    and of `dataset_info.json`, and the `licenses` of COCO files, which images refer to.

    Args:
        source: The dataset.
        images: Those that are used.
    """
    return tuple(dict.fromkeys([*_in_metadata(source.root), *_in_coco(source, images)]))


def origin_of(source: DatasetSource) -> str | None:
    """The origin that `info` of a COCO file declares; None where it declares none, and for other formats."""
    for file in _coco_files(source):
        value = _values(file).get("info")
        try:
            info = None if value is None else msgspec.json.decode(value.text())
        except (OSError, msgspec.MsgspecError):
            continue
        if isinstance(info, dict):
            declared = [str(info[key]).strip() for key in ("description", "url") if info.get(key)]
            return _short(", ".join(declared)) if declared else None
    return None


def _in_metadata(root: Path) -> Iterator[Licence]:
    for name in _METADATA:
        text = start_of(root / name, _LARGEST).decode("utf-8-sig", errors="replace")
        try:
            values: Any = card_header(text) if name.endswith(".md") else yaml.safe_load(text)  # JSON is YAML
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            _logger.debug("%s: no licence can be read: %s", root / name, error)
            continue
        exported = values.get("roboflow") if isinstance(values, dict) else None
        for owner in filter(lambda found: isinstance(found, dict), (values, exported)):
            declared = owner.get("license") or owner.get("licence")
            for one in declared if isinstance(declared, list) else [declared]:
                if one:
                    yield Licence(text=_short(str(one)), stated_in=name)


def _in_coco(source: DatasetSource, images: Annotations) -> Iterator[Licence]:
    """The licences that COCO files list, each with the number of used images that refer to it."""
    counts: Counter[tuple[str, str | None, str]] = Counter()
    used: set[str] = set()
    for file in _coco_files(source):
        used = used or {images[index].path.name for index in range(len(images))}
        values = _values(file)
        names = {one.id: (one.name or str(one.id), one.url) for one in _entries(values, "licenses", _CocoLicence)}
        where = file.relative_to(source.root).as_posix() if file.is_relative_to(source.root) else file.name
        for image in _entries(values, "images", _CocoImage) if names else ():
            if image.license in names and Path(image.file_name).name in used:
                counts[(*names[image.license], where)] += 1
    for (name, url, where), number in counts.most_common():
        yield Licence(text=_short(name), url=url, stated_in=where, images=number)


def _coco_files(source: DatasetSource) -> Iterator[Path]:
    if source.format in _COCO:
        try:
            reader = recognise(source.spec.path, source.spec.format, tell_others=False)
        except DataError:  # opened from an index whose files are gone
            return
        for files in reader.splits.values():
            yield from files


def _values(file: Path) -> Mapping[str, Value]:
    try:
        return values_of(file, _PIECE_BYTES)
    except (OSError, ValueError) as error:
        _logger.debug("%s: no licence can be read: %s", file, error)
        return {}


def _entries(values: Mapping[str, Value], key: str, kind: type[_Entry]) -> Iterator[_Entry]:
    """The entries of a list in a COCO file; none from where on they cannot be decoded."""
    try:
        for piece in values[key].pieces() if key in values else ():
            yield from msgspec.json.decode(piece, type=list[kind])  # type: ignore[valid-type]
    except (OSError, msgspec.MsgspecError) as error:
        _logger.debug("no licence can be read from `%s`: %s", key, error)


def _short(text: str) -> str:
    """One line of at most `_LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3].rstrip()}..."
