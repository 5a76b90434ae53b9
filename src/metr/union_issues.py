"""What pydantic finds wrong where a value may be of several kinds, under the key that a user wrote.

Pydantic names each alternative in the place of an issue, as `loader.mixture.literal['sqrt','equal']`, and has an issue
for each of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

Place = tuple[int | str, ...]

__all__ = ["by_key"]

# what is said of a value that is of another kind altogether
_OTHER_KIND = ("_type", "_parsing", "literal_error", "is_instance_of")


def by_key(cls: type[BaseModel], issues: Sequence[ErrorDetails]) -> list[tuple[str, list[ErrorDetails]]]:
    """Each faulty key as a user writes it, and what is wrong: one issue, or one for each kind that its value may have.

    Where a value has one of the kinds but a fault inside, the other kinds are left out.
    """
    groups: dict[tuple[Place, bool], list[tuple[Place, ErrorDetails]]] = {}
    for issue in issues:
        parts = list(_parts(cls, issue["loc"]))
        inner = tuple(part for part, is_kind in parts if not is_kind)
        first = next((place for place, (_, is_kind) in enumerate(parts) if is_kind), None)
        key = (inner if first is None else inner[:first], first is not None)
        groups.setdefault(key, []).append((inner, issue))
    found: list[tuple[str, list[ErrorDetails]]] = []
    for (outer, is_union), some in groups.items():
        if not is_union:
            found += [(_dotted(inner), [issue]) for inner, issue in some]
        elif inside := [pair for pair in some if len(pair[0]) > len(outer) or not _is_of_another_kind(pair[1])]:
            found += [(_dotted(inner), [issue]) for inner, issue in inside]
        else:
            found.append((_dotted(outer), [issue for _, issue in some]))
    return found


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _is_of_another_kind(issue: ErrorDetails) -> bool:
    return issue["type"].endswith(_OTHER_KIND)


def _parts(kind: Any, place: Place) -> Iterator[tuple[int | str, bool]]:
    """The parts of an issue's place, and whether each is the name of a kind rather than of a key."""
    if not place:
        return
    kind = _without_none(kind)
    alternatives = get_args(kind) if get_origin(kind) in {Union, UnionType} else ()
    first, rest = place[0], place[1:]
    yield first, bool(alternatives)
    if alternatives:
        inner = next((one for one in alternatives if _is_called(one, str(first))), None)
    else:
        inner = _inside(kind, first)
    yield from _parts(inner, rest)


def _without_none(kind: Any) -> Any:
    """A type without annotations, and without None where that is the only alternative."""
    if get_origin(kind) is Annotated:
        return _without_none(get_args(kind)[0])
    if get_origin(kind) in {Union, UnionType}:
        some = [one for one in get_args(kind) if one is not NoneType]
        return _without_none(some[0]) if len(some) == 1 else Union[tuple(some)]  # noqa: UP007  (made at run time)
    return kind


def _is_called(kind: Any, name: str) -> bool:
    """Whether pydantic calls a type so: by its name, and what it holds in brackets."""
    kind = _without_none(kind)
    own = get_origin(kind) or kind
    return getattr(own, "__name__", "").lower() == name.partition("[")[0].lower()


def _inside(kind: Any, part: int | str) -> Any:
    """The type of what lies at a key, an index or a name of a value of this type; None where that is not known."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return None if field is None else field.annotation
    inner, own = get_args(kind), get_origin(kind)
    if not inner or not isinstance(own, type):
        return None
    if issubclass(own, Mapping):
        return inner[1]
    if own is tuple and isinstance(part, int) and part < len(inner) and Ellipsis not in inner:
        return inner[part]
    return inner[0]
