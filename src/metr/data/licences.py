"""Licences of datasets as their folders give them: repeated, not judged. Statements may contradict each other."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from metr.data.datasets_file import DatasetSource
from metr.data.formats.json_pieces import Value, values_of
from metr.data.formats.registry import recognise
from metr.data.records import Annotations
from metr.errors import DataError

_logger = logging.getLogger(__name__)
_LONGEST = 300  # characters of a statement
_LARGEST = 1 << 20  # bytes of a file that is taken for text
_PIECE_BYTES = 1 << 24
_COCO = frozenset({"coco", "lvis", "objects365"})

# how the files of licences begin, or what only they say
_KNOWN = (
    (r"apache license\s+version 2\.0", "Apache-2.0"),
    (r"gnu affero general public license\s+version 3", "AGPL-3.0"),
    (r"gnu lesser general public license\s+version 3", "LGPL-3.0"),
    (r"gnu general public license\s+version 3", "GPL-3.0"),
    (r"gnu general public license\s+version 2", "GPL-2.0"),
    (r"mit license|permission is hereby granted, free of charge", "MIT"),
    (r"redistribution and use in source and binary forms", "BSD"),
    (r"cc0 1\.0 universal", "CC0-1.0"),
    (r"this is free and unencumbered software released into the public domain", "Unlicense"),
)
_CREATIVE_COMMONS = re.compile(
    r"(?:creative commons )?attribution(-noncommercial)?(-sharealike|-noderivatives|-noderivs)? (\d\.\d)", re.IGNORECASE
)
_SAID = re.compile(r"^[\s>*_|+-]*licen[cs]es?[\s*_]*[:|][\s*_]*(\S.*?)[\s*_|]*$", re.IGNORECASE | re.MULTILINE)
_HEADED = re.compile(r"^#+\s*licen[cs](?:es?|ing)\s*\n+([^\n#].*)$", re.IGNORECASE | re.MULTILINE)


class Licence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One statement about a dataset's licence.

    `stated_in` is the file that says so, relative to the dataset's folder. `images` is how many of the images it is
    said of; None is the dataset as a whole.
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
    """Of an image of a COCO file what matters here."""

    file_name: str
    license: int | str | None = None


def licences_of(source: DatasetSource, images: Annotations) -> tuple[Licence, ...]:
    """What a dataset's folder says of its licence; nothing where it says nothing.

    Read are licence files, READMEs, the description of a YOLO dataset, and the `licenses` of COCO files, these image
    by image.

    Args:
        source: The dataset.
        images: Those that are used.
    """
    found = [*_in_texts(source.root), *_in_yaml(source.root)]
    if source.format in _COCO:
        found += _in_coco(source, images)
    return tuple(dict.fromkeys(found))


def origin_of(source: DatasetSource) -> str | None:
    """Where a COCO file says that the dataset comes from; None where it does not, and for other formats."""
    for file in _coco_files(source):
        info = _decoded(_values(file).get("info"), dict)
        if isinstance(info, dict):
            told = [str(info[key]).strip() for key in ("description", "url") if info.get(key)]
            return _short(", ".join(told)) if told else None
    return None


def recognised_licence(text: str) -> str | None:
    """The common name of the licence that a licence file holds, if it is a common one."""
    plain = " ".join(text.split()).lower()
    for pattern, name in _KNOWN:
        if re.search(pattern, plain):
            return name
    found = _CREATIVE_COMMONS.search(plain)
    if found is None:
        return None
    kind, limit, version = found.groups()
    limits = {None: "", "-sharealike": "-SA", "-noderivatives": "-ND", "-noderivs": "-ND"}
    return f"CC-BY{'-NC' if kind else ''}{limits[limit]}-{version}"


def _in_texts(root: Path) -> Iterator[Licence]:
    """Statements of licence files and READMEs."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        name = path.name.lower()
        if re.match(r"(licen[cs]e|copying)", name):
            text = _text(path)
            first = next((line.strip() for line in text.splitlines() if line.strip()), None)
            if told := recognised_licence(text) or first:
                yield Licence(text=_short(told), stated_in=path.name)
        elif name.startswith("readme"):
            for told in _said(_text(path)):
                yield Licence(text=_short(told), stated_in=path.name)


def _said(text: str) -> list[str]:
    """What a README says in a line `License: ...`, under such a heading, or in a header as the hub's cards have it."""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if header is not None:
        values = _yaml(header.group(1))
        given = values.get("license")
        if given:
            return [str(one) for one in (given if isinstance(given, list) else [given])]
    return _SAID.findall(text)[:1] or _HEADED.findall(text)[:1]


def _in_yaml(root: Path) -> Iterator[Licence]:
    """What the description of a YOLO dataset says, as Roboflow writes it."""
    path = root / "data.yaml"
    values = _yaml(_text(path)) if path.is_file() else {}
    exported = values.get("roboflow")
    for owner in (values, exported if isinstance(exported, dict) else {}):
        if told := owner.get("license") or owner.get("licence"):
            yield Licence(text=_short(str(told)), stated_in=path.name)


def _in_coco(source: DatasetSource, images: Annotations) -> Iterator[Licence]:
    """The licences that COCO files list, for as many of the images as name them."""
    used = {images[index].path.name for index in range(len(images))}
    counts: Counter[tuple[str, str | None, str]] = Counter()
    for file in _coco_files(source):
        values = _values(file)
        listed = _decoded(values.get("licenses"), list[_CocoLicence]) or []
        names = {one.id: (one.name or str(one.id), one.url) for one in listed}
        where = file.relative_to(source.root).as_posix() if file.is_relative_to(source.root) else file.name
        for image in _images(values.get("images")) if names else ():
            if image.license in names and Path(image.file_name).name in used:
                counts[(*names[image.license], where)] += 1
    for (name, url, where), number in counts.most_common():
        yield Licence(text=_short(name), url=url, stated_in=where, images=number)


def _coco_files(source: DatasetSource) -> Iterator[Path]:
    if source.format in _COCO:
        try:
            reader = recognise(source.config.path, source.config.format, tell_others=False)
        except DataError:  # opened from an index whose files are gone
            return
        for files in reader.splits.values():
            yield from files


def _values(file: Path) -> Mapping[str, Value]:
    try:
        return values_of(file, _PIECE_BYTES)
    except (OSError, ValueError, DataError, msgspec.MsgspecError) as error:
        _logger.debug("%s: looked for licences in vain: %s", file, error)
        return {}


def _decoded(value: Value | None, kind: Any) -> Any:
    """A value of a JSON file as `kind`; None where there is none, or it is something else."""
    if value is None:
        return None
    try:
        return msgspec.json.decode(value.text(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _images(value: Value | None) -> Iterator[_CocoImage]:
    try:
        for piece in value.pieces() if value is not None else ():
            yield from msgspec.json.decode(piece, type=list[_CocoImage])
    except (OSError, msgspec.MsgspecError) as error:
        _logger.debug("the licences of images cannot be read: %s", error)


def _text(path: Path) -> str:
    """A small text file; nothing where it is none, or cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _short(text: str) -> str:
    """One line of bearable length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3].rstrip()}..."
