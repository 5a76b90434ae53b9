"""What the columns of a Hugging Face table are: the image, its objects, and the names of their numbered categories."""

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as pt
import yaml

from metr.data.formats.files import decoded, start_of
from metr.data.formats.imagefolder import card_header

# Which of several columns is the image or its path; and the objects.
_IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "image_bytes", "bytes")
_PATHS = ("image", "file_name", "filename", "image_path", "path")
_OBJECTS = ("objects", "annotations", "labels")
_SIZES = ("width", "height")
# Keys of a description of features that are no names of features.
_WRAPPERS = frozenset({"feature", "dtype", "sequence", "list", "large_list", "struct", "class_label"})
_DEEPEST, _LARGEST = 20, 1 << 22


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are read.

    `objects` are one column with lists of its own, or several that are lists side by side. `inner` are the keys of a
    single column of objects that are read, for others may be masks; empty: it is text.
    """

    image: str
    objects: tuple[str, ...]
    inner: frozenset[str] = frozenset()
    sizes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [self.image, *self.objects, *self.sizes]


def columns_of(schema: pa.Schema) -> Columns | None:
    """The columns of a table with images and boxes; None for other tables."""
    types = {field.name: _plain(field.type) for field in schema}
    embedded = [name for name, kind in types.items() if _is_image(kind)]
    image = _first(_IMAGES, embedded) or _first(_PATHS, [name for name in _PATHS if _is_text(types.get(name))])
    if image is None:
        return None
    sizes = tuple(name for name in _SIZES if name in types)
    inner = {name: _inner(kind) for name, kind in types.items()}
    single = _first(_OBJECTS, [name for name, keys in inner.items() if keys])
    if single is not None:
        return Columns(image=image, objects=(single,), inner=inner[single], sizes=sizes)
    if _is_text(types.get("objects")):
        return Columns(image=image, objects=("objects",), sizes=sizes)
    lists = tuple(name for name, kind in types.items() if _is_list(kind) and _is_scalar(_item(kind)))
    boxes = tuple(name for name, kind in types.items() if _is_boxes(kind))
    return Columns(image=image, objects=(*boxes, *lists), sizes=sizes) if boxes and lists else None


def class_labels(schema: pa.Schema, root: Path, folder: Path, columns: Columns) -> dict[str, tuple[str, ...]]:
    """The names of numbered categories by the key of the objects that has the numbers.

    They are taken from the table itself, else from `dataset_info.json` beside it or above, else from the card.

    Args:
        schema: That of the table.
        root: The dataset's folder.
        folder: That of the table.
        columns: Those that are read.
    """
    places = dict.fromkeys([folder, *folder.parents[: len(folder.relative_to(root).parts)]])
    for features in (
        _of_table(schema),
        *(_of_info(_read(place / "dataset_info.json")) for place in places),
        _of_card(card_values(root)),
    ):
        found = dict(pair for column in columns.objects for pair in _labels(_of_column(features, column), column, 0))
        if found:
            return found
    return {}


def data_files(root: Path, files: Sequence[Path]) -> tuple[dict[str, tuple[Path, ...]], str]:
    """The files of each split as the dataset's card divides them, and the name of the configuration that is taken.

    Nothing where the card does not say, or names none of the files.
    """
    card = card_values(root)
    places = {file.relative_to(root).as_posix(): file for file in files}
    for name, splits in configs_of(card, list(places)).items():
        chosen = {split: tuple(places[name] for name in names) for split, names in splits.items()}
        return chosen, name if len(_as_list(card.get("configs"))) > 1 else ""
    return {}, ""


def configs_of(card: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The files of each split of each configuration that a card describes, its default configuration first.

    Args:
        card: What the card says.
        names: The files, relative to the dataset's folder. A configuration that names none of them is left out.
    """
    configs = [one for one in _as_list(card.get("configs")) if isinstance(one, dict)]
    default = [one for one in configs if one.get("default") or one.get("config_name") == "default"]
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for config in [*default, *configs]:
        splits: dict[str, tuple[str, ...]] = {}
        for split, patterns in _patterns(config):
            fits = [re.compile(_as_regex(pattern)) for pattern in patterns]
            if chosen := tuple(name for name in names if any(fit.fullmatch(name) for fit in fits)):
                splits[split] = chosen
        if splits:
            found.setdefault(str(config.get("config_name", "")), splits)
    return found


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    value = config.get("data_files")
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        entries = _as_list(value)
        named = [one for one in entries if isinstance(one, dict)]
        pairs = [(one.get("split", "train"), one.get("path")) for one in named]
        plain = [one for one in entries if isinstance(one, str)]
        pairs += [("train", plain)] if plain else []
    for split, paths in pairs:
        inner = [posixpath.normpath(path) for path in _as_list(paths) if isinstance(path, str)]
        yield str(split), inner


def _as_regex(pattern: str) -> str:
    """A pattern of paths as a regular expression: `**` crosses folders, and a folder means all that is in it."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part, re.escape(part)) for part in parts) + "(?:/.*)?"


def _of_table(schema: pa.Schema) -> Any:
    text = (schema.metadata or {}).get(b"huggingface", b"")
    info = _json(text).get("info")
    return info.get("features") if isinstance(info, dict) else None


def _of_info(text: bytes) -> Any:
    return _json(text).get("features")


def _of_card(card: Mapping[str, Any]) -> Any:
    infos = [one for one in _as_list(card.get("dataset_info")) if isinstance(one, dict)]
    return next((one.get("features") for one in infos if one.get("features")), None)


def card_values(root: Path) -> dict[str, Any]:
    """What the header of a dataset's card says; nothing where there is no card, or no such header."""
    try:
        header = card_header(decoded(_read(root / "README.md")))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _of_column(features: Any, column: str) -> Any:
    if isinstance(features, dict):
        return features.get(column)
    return next((one for one in _as_list(features) if isinstance(one, dict) and one.get("name") == column), None)


def _labels(value: Any, key: str, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of each feature that is a class label, by its own name; from JSON and from the YAML of cards."""
    if depth > _DEEPEST:  # YAML can contain itself
        return
    if isinstance(value, list):
        for one in value:
            yield from _labels(one, key, depth + 1)
    elif isinstance(value, dict):
        inner = value.get("class_label")
        names = value.get("names") if value.get("_type") == "ClassLabel" else None
        if isinstance(inner, dict):
            names = inner.get("names")
        key = value["name"] if isinstance(value.get("name"), str) else key
        if isinstance(names, dict):
            names = [names[number] for number in sorted(names, key=_number)]
        if isinstance(names, list) and names:
            yield key, tuple(map(str, names))
            return
        for name, below in value.items():
            if isinstance(below, dict | list):
                yield from _labels(below, key if name in _WRAPPERS else name, depth + 1)


def _number(text: Any) -> tuple[int, str]:
    return (int(text), "") if str(text).isdigit() else (0, str(text))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _json(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> bytes:
    return start_of(path, _LARGEST)


def _first(preferred: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the preferred names that is there, else the first name."""
    return next((name for name in preferred if name in names), next(iter(names), None))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_list(kind: pa.DataType) -> bool:
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def _item(kind: pa.DataType) -> pa.DataType:
    return _plain(kind.value_type)


def _is_text(kind: pa.DataType | None) -> bool:
    return kind is not None and bool(pt.is_string(kind) or pt.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    return _is_number(kind) or _is_text(kind) or bool(pt.is_boolean(kind))


def _is_boxes(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_list(_item(kind)) and _is_number(_item(_item(kind)))


def _is_image(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind))


def _inner(kind: pa.DataType) -> frozenset[str]:
    """The keys of objects that are numbers, texts or boxes: from a struct of lists, or a list of structs. Else none."""
    rows = _is_list(kind)
    struct = _item(kind) if rows else kind
    if not pt.is_struct(struct):
        return frozenset()
    kinds = {field.name: _plain(field.type) for field in struct}
    if rows:
        boxes = {name for name, one in kinds.items() if _is_list(one) and _is_number(_item(one))}
        others = {name for name, one in kinds.items() if _is_scalar(one)}
    else:
        boxes = {name for name, one in kinds.items() if _is_boxes(one)}
        others = {name for name, one in kinds.items() if _is_list(one) and _is_scalar(_item(one))}
    return frozenset(boxes | others) if boxes else frozenset()
