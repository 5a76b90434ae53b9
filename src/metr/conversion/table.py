"""Key tables: which parameter of one network is which of another.

A table is a list of `Row`s. A row pairs key templates; `{i}` stands for a layer's number (`{j}` for that of a part
inside the layer), `{p}` for `weight` or `bias`, `{n}` for what a batch norm has, and `{k}` for whatever is left of a
key. Where `ours` holds several templates, the other side keeps them in one tensor, stacked along its first axis (the
query, key and value projections of PyTorch's attention).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from metr.errors import CheckpointError

State = dict[str, Tensor]

_STATISTICS = "running_mean|running_var|num_batches_tracked"
_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias", "n": f"weight|bias|{_STATISTICS}", "k": ".+"}


@dataclass(frozen=True)
class Row:
    """One line of a table: their key template and ours (or ours in the order in which they are stacked)."""

    theirs: str
    ours: str | tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Our templates."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def match(self, key: str) -> dict[str, str] | None:
        """What the placeholders stand for where the row's first part is this key of ours; None where it is not."""
        found = _pattern(self.parts[0]).fullmatch(key)
        return None if found is None else found.groupdict()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What moved: the new state, which of the source's keys went into it, and which were left over."""

    state: State
    used: tuple[str, ...]
    left_over: tuple[str, ...]


def to_ours(theirs: Mapping[str, Tensor], table: Sequence[Row]) -> Conversion:
    """Another network's state under METR's names.

    Raises:
        CheckpointError: two of their keys claim the same name of ours, or a tensor is no stack of as many parts as
            its row names.
    """
    patterns = [(_pattern(row.theirs), row) for row in table]
    state: State = {}
    used, left_over = [], []
    for key, tensor in theirs.items():
        found = next(((m, row) for pattern, row in patterns if (m := pattern.fullmatch(key))), None)
        if found is None:
            left_over.append(key)
            continue
        match, row = found
        for template, piece in zip(row.parts, _pieces(key, tensor, len(row.parts)), strict=True):
            name = template.format(**match.groupdict())
            if name in state:
                raise CheckpointError(f"two keys become {name!r}", where=key, hint="check the key table")
            state[name] = piece
        used.append(key)
    return Conversion(state=state, used=tuple(used), left_over=tuple(left_over))


def to_theirs(ours: Mapping[str, Tensor], table: Sequence[Row]) -> Conversion:
    """METR's state under another network's names.

    Raises:
        CheckpointError: a part of one of their stacked tensors is missing.
    """
    state: State = {}
    used: set[str] = set()
    for row in table:
        for key in ours:
            match = row.match(key)
            if match is None:
                continue
            parts = [template.format(**match) for template in row.parts]
            name = row.theirs.format(**match)
            if missing := [part for part in parts if part not in ours]:
                raise CheckpointError(f"needs {', '.join(missing)} besides {key}", where=name)
            state[name] = torch.cat([ours[part] for part in parts]) if len(parts) > 1 else ours[key].clone()
            used.update(parts)
    moved, left_over = ([k for k in ours if (k in used) is wanted] for wanted in (True, False))
    return Conversion(state=state, used=tuple(moved), left_over=tuple(left_over))


def _pieces(key: str, tensor: Tensor, number: int) -> Sequence[Tensor]:
    """A stacked tensor's parts, each with a storage of its own."""
    if number == 1:
        return [tensor.contiguous()]
    if not tensor.ndim or tensor.shape[0] % number:
        shape = list(tensor.shape)
        raise CheckpointError(f"expected {number} equal parts along the first axis, found {shape}", where=key)
    return [piece.clone() for piece in tensor.chunk(number)]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression."""
    escaped = re.escape(template)
    for name, pattern in _PLACEHOLDERS.items():
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{pattern})")
    return re.compile(escaped)
