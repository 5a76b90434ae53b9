"""WebDataset: a tar is a sequence of samples, whose files have one name and several suffixes.

`KEY.jpg` (or any suffix of an image) is the image of a sample, and `KEY.json` tells of it. The name of a file up to its
first dot is the key, the rest its kind: `KEY.mask.png` is not the image. The files of a sample stand one after another.

The JSON is a list of objects, or an object that has such a list as `objects`, `annotations` or `instances`, or lists
side by side there or at its top (`boxes` and `labels`). Boxes and categories are those of imagefolder
(`metr.data.formats.imagefolder`). Besides these are read `width` and `height`, which the boxes are meant in,
`image_id`, `categories` (`[{"id": 7, "name": "cat"}]`, which name the numbers of this sample) and `exhaustive`, the
names that are annotated exhaustively in this image. JSON without objects, such as img2dataset's, makes an image
without annotations.
"""

import contextlib
import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from metr.data.containers.archives import StrictMember
from metr.data.containers.huggingface import DamagedShardError
from metr.data.formats.files import is_image
from metr.data.formats.imagefolder import BOX_KEYS, CATEGORY_KEYS
from metr.data.shards.tables import Row, measure

# The most bytes of one image, and of the JSON of one.
_LARGEST_IMAGE, _LARGEST_JSON = 1 << 28, 1 << 26
_OBJECTS = ("objects", "annotations", "instances", "detections")
_IDS = ("image_id", "id")
_LISTED = 8
_AGAIN = "download or copy it again"


def rows_of_tar(stream: io.BufferedReader, where: str) -> Iterator[Row]:
    """The samples of a tar that is not compressed, in their order; one of them is in memory at a time.

    Args:
        stream: The tar, from its start.
        where: What messages call it.

    Raises:
        DamagedShardError: it is damaged or cut off; the samples before that have been given.
        StoreError: the store does not answer.
    """
    current: _Sample | None = None
    try:
        for member in _members(stream, where):
            key, kind = _key(member.name)
            if not kind:
                continue
            if current is None or key != current.key:
                if current is not None:
                    yield current.row()
                current = _Sample(key)
            with _reading(where, member.name):
                current.add(kind, member, stream)
    except DamagedShardError:
        if current is not None and current.image is not None and current.told is not None:
            yield current.row()  # it came before the damage
        raise
    if current is not None:
        yield current.row()


class _Sample:
    """The files of a sample, as far as they have come."""

    def __init__(self, key: str) -> None:
        self.key, self.kinds = key, list[str]()
        self.image: Row | None = None
        self.told: Any = None
        self.trouble: tuple[str, str] | None = None

    def add(self, kind: str, member: tarfile.TarInfo, stream: io.BufferedReader) -> None:
        """Takes a file of the sample."""
        self.kinds.append(kind)
        if is_image(f"x.{kind}") and "." not in kind and self.image is None:
            row = Row(file_name=f"{self.key}.{kind}", offset=member.offset_data, size=member.size)
            if member.size > _LARGEST_IMAGE or member.issparse():
                row.trouble = "unreadable image", f"{row.file_name} has {member.size:,} bytes"
            else:
                measure(row, _content(member, stream))
            self.image = row
        elif kind == "json":
            if member.size > _LARGEST_JSON:
                self.trouble = "unreadable annotation", f"{self.key}.json has {member.size:,} bytes"
                return
            try:
                self.told = json.loads(_content(member, stream))
            except (ValueError, RecursionError) as error:
                self.trouble = "unreadable annotation", f"{self.key}.json: {error}"[:120]

    def row(self) -> Row:
        """What the index takes of the sample."""
        row = self.image or Row(file_name=self.key)
        if self.image is None:
            row.trouble = "missing image", f"{self.key} has {', '.join(self.kinds[:_LISTED])}, and no image"
        row.trouble = row.trouble or self.trouble
        if isinstance(self.told, dict):
            _describe(row, self.told)
        row.objects = _objects(self.told)
        if row.objects is None and row.trouble is None:
            row.trouble = (
                "unannotated image",
                f"{row.file_name} has no objects, not even an empty list{self._instead()}",
            )
        return row

    def _instead(self) -> str:
        """What a sample without objects has."""
        if isinstance(self.told, dict):
            return f": its JSON has {', '.join(map(str, list(self.told)[:_LISTED])) or 'nothing'}"
        return f": it has {', '.join(self.kinds[:_LISTED])}"


def _describe(row: Row, told: Mapping[str, Any]) -> None:
    """Takes what the JSON says of the image: its size, its id, and what is annotated exhaustively."""
    inner = told.get("image")
    for values in (told, inner if isinstance(inner, dict) else {}):
        height, width = values.get("height"), values.get("width")
        if _is_number(height) and _is_number(width):
            row.height, row.width = height, width
            break
    row.image_id = next((told[key] for key in _IDS if isinstance(told.get(key), int | str)), None)
    names = told.get("exhaustive")
    if isinstance(names, list):
        row.exhaustive = [name for name in names if isinstance(name, str)]


def _objects(told: Any) -> Any:
    """The objects of a sample in the keys of imagefolder; None where it has none, not even an empty list."""
    names: dict[Any, str] = {}
    found: Any = told if isinstance(told, list) else None
    if isinstance(told, dict):
        listed = told.get("categories")
        entries = listed if isinstance(listed, list) and all(isinstance(one, dict) for one in listed) else []
        names = {
            one["id"]: one["name"] for one in entries if _is_id(one.get("id")) and isinstance(one.get("name"), str)
        }
        found = next((told[key] for key in _OBJECTS if isinstance(told.get(key), list | dict)), None)
        if found is None and _side_by_side(told):
            found = {key: told[key] for key in (*BOX_KEYS, *CATEGORY_KEYS) if isinstance(told.get(key), list)}
            found |= {key: told[key] for key in ("iscrowd", "area") if isinstance(told.get(key), list)}
    if isinstance(found, list):
        return [_object(one, names) for one in found] if all(isinstance(one, dict) for one in found) else None
    return _object(found, names) if isinstance(found, dict) else None


def _object(values: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    """An object, or lists of them side by side, with the names of categories where they can be told."""
    kept = {key: value for key, value in values.items() if key != "segmentation"}
    if "category_name" in kept:
        kept["category"] = kept.pop("category_name")
    for key in CATEGORY_KEYS:
        value = kept.get(key)
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            kept[key] = value["name"]
        elif isinstance(value, list):
            kept[key] = [names.get(one, one) if _is_id(one) else one for one in value]
        elif _is_id(value):
            kept[key] = names.get(value, value)
    return kept


def _side_by_side(told: Mapping[str, Any]) -> bool:
    return all(any(isinstance(told.get(key), list) for key in keys) for keys in (BOX_KEYS, CATEGORY_KEYS))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _members(stream: io.BufferedReader, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar."""
    with _reading(where, "its start"):
        archive = tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictMember)  # noqa: SIM115  (nothing to close)
    size = 0
    while True:
        with _reading(where, f"a header after {size:,} bytes"):
            member = archive.next()
        if member is None:
            stream.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DamagedShardError("cut off: the mark of its end is missing", where=where, hint=_AGAIN)
            return
        archive.members.clear()  # type: ignore[attr-defined]  # millions of them would stay in memory
        size = member.offset_data + member.size
        if member.isreg():
            yield member


def _content(member: tarfile.TarInfo, stream: io.BufferedReader) -> bytes:
    """The bytes of a file in a tar.

    Raises:
        EOFError: the tar is cut off in it.
    """
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise EOFError(f"{len(data):,} bytes in place of {member.size:,}")
    return data


def _key(name: str) -> tuple[str, str]:
    """The key of a file's sample and the file's kind, in lower case; no kind of hidden files and of those without."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in {"", ".", ".."}]
    stem, _, kind = (parts[-1] if parts else "").partition(".")
    return (posixpath.join(*parts[:-1], stem), kind.lower()) if stem else ("", "")


@contextlib.contextmanager
def _reading(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, msgspec.MsgspecError) as error:
        detail = f"a damaged or cut off shard: {what} cannot be read ({error})"
        raise DamagedShardError(detail, where=where, hint=_AGAIN) from None
