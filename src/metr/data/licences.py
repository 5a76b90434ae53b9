"""Licences of datasets as their files declare them: repeated, not judged. Declarations may contradict each other."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import yaml

from metr.bounded_yaml import load_yaml
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
# The texts in which a line of its own names the licence, such as those of Roboflow's exports.
_TEXTS = ("README.md", "README.txt", "README.dataset.txt", "README.roboflow.txt")
_LINE = re.compile(r"^[ \t>*_-]*licen[cs]e[*_]*[ \t]*:[*_]*[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
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


def licences_of(source: DatasetSource, images: Annotations) -> tuple[Licence, ...]:
    """The licences that a dataset's files declare; none where they declare none.

    Read are the key `license` of the dataset's card, of the description of a YOLO dataset (also as Roboflow writes it)
    and of `dataset_info.json`, the first line "License: ..." of a README, and the `licenses` of COCO files, which
    images refer to. Other text is not interpreted.

    Args:
        source: The dataset.
        images: Those that are used.
    """
    return tuple(dict.fromkeys([*_in_metadata(source.root), *_in_texts(source.root), *_in_coco(source, images)]))


def origin_of(source: DatasetSource) -> str | None:
    """The origin that `info` of a COCO file declares; None where it declares none, and for other formats."""
    for _, values in _coco_files(source):
        for info in _decoded(values.get("info"), dict[str, Any]):
            declared = [str(info[key]).strip() for key in ("description", "url") if info.get(key)]
            return _short(", ".join(declared)) if declared else None
    return None


def _in_metadata(root: Path) -> Iterator[Licence]:
    for name in _METADATA:
        text = start_of(root / name, _LARGEST).decode("utf-8-sig", errors="replace")
        try:
            values: Any = card_header(text) if name.endswith(".md") else load_yaml(text)  # JSON is YAML
        except yaml.YAMLError as error:
            _logger.debug("%s: no licence can be read: %s", root / name, error)
            continue
        exported = values.get("roboflow") if isinstance(values, dict) else None
        for owner in filter(lambda found: isinstance(found, dict), (values, exported)):
            declared = owner.get("license") or owner.get("licence")
            for one in declared if isinstance(declared, list) else [declared]:
                if one:
                    yield Licence(text=_short(str(one)), stated_in=name)


def _in_texts(root: Path) -> Iterator[Licence]:
    for name in _TEXTS:
        text = start_of(root / name, _LARGEST).decode("utf-8-sig", errors="replace")
        header = text.startswith("---")  # of a dataset's card, whose key is read as such
        if (line := None if header else _LINE.search(text)) is not None:
            yield Licence(text=_short(line[1]), stated_in=name)


def _in_coco(source: DatasetSource, images: Annotations) -> Iterator[Licence]:
    """The licences that COCO files list, each with the number of used images that refer to it."""
    counts: Counter[tuple[str, str | None, str]] = Counter()
    used: set[str] = set()
    for where, values in _coco_files(source):
        used = used or {images[index].path.name for index in range(len(images))}
        listed = chain.from_iterable(_decoded(values.get("licenses"), list[_CocoLicence]))
        names = {one.id: (one.name or str(one.id), one.url) for one in listed}
        for image in chain.from_iterable(_decoded(values.get("images"), list[_CocoImage]) if names else ()):
            if image.license in names and Path(image.file_name).name in used:
                counts[(*names[image.license], where)] += 1
    for (name, url, where), number in counts.most_common():
        yield Licence(text=_short(name), url=url, stated_in=where, images=number)


def _coco_files(source: DatasetSource) -> Iterator[tuple[str, dict[str, Value]]]:
    """The COCO files of a dataset, relative to its folder, with their values; none of another format."""
    if source.format in _COCO:
        with contextlib.suppress(DataError):  # opened from an index whose files are gone
            reader = recognise(source.config.path, source.config.format)
            for file in chain.from_iterable(reader.splits.values()):
                with contextlib.suppress(OSError, ValueError):
                    yield reader.within(file), values_of(file, _PIECE_BYTES)


def _decoded(value: Value | None, kind: Any) -> Iterator[Any]:
    """A value of a JSON file, an array in pieces; nothing from where on it is not of a kind."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        if value is not None:
            for text in value.pieces() if value.is_array else [value.text()]:
                yield msgspec.json.decode(text, type=kind)


def _short(text: str) -> str:
    """One line of at most `_LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3].rstrip()}..."
