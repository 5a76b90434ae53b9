"""What became of every weight on its way from one detector to another."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

_KINDS = ("copied", "reshaped", "afresh", "left over")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A tensor of the receiver that came, bit by bit or in another form, from the giver.

    Attributes:
        key: The receiver's name of it.
        source: The giver's names.
        how: In what other form; empty where it is a copy.
    """

    key: str
    source: tuple[str, ...]
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """The way of every weight.

    Attributes:
        source: What gave.
        receiver: What received.
        copied: Bit by bit.
        reshaped: Stacked, cut, fitted or computed from the giver's.
        afresh: The receiver's, as its own initialisation left them.
        left_over: The giver's, which nothing took.
        notes: What a reader should know: what differs in spite of equal weights, what did not fit and why.
    """

    source: str
    receiver: str
    copied: tuple[Moved, ...]
    reshaped: tuple[Moved, ...]
    afresh: tuple[str, ...]
    left_over: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors went which way."""
        return dict(zip(_KINDS, map(len, (self.copied, self.reshaped, self.afresh, self.left_over)), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "from": self.source,
            "to": self.receiver,
            "counts": self.counts,
            "notes": list(self.notes),
            "copied": {moved.key: list(moved.source) for moved in self.copied},
            "reshaped": {moved.key: {"from": list(moved.source), "how": moved.how} for moved in self.reshaped},
            "afresh": list(self.afresh),
            "left over": list(self.left_over),
        }

    def table(self) -> Table:
        """Tensors by part of the receiver (and of the giver, for what is left over), for a terminal."""
        table = Table(title=f"{self.source} to {self.receiver}", title_justify="left")
        table.add_column("part")
        for kind in _KINDS:
            table.add_column(kind, justify="right")
        columns = (
            _parts(moved.key for moved in self.copied),
            _parts(moved.key for moved in self.reshaped),
            _parts(self.afresh),
            _parts(self.left_over),
        )
        for part in dict.fromkeys(part for column in columns for part in sorted(column)):
            table.add_row(part, *(str(column[part]) if column[part] else "" for column in columns))
        table.add_section()
        table.add_row("together", *map(str, self.counts.values()))
        return table

    def reshapings(self) -> Mapping[str, int]:
        """The ways in which tensors changed their form, and how many each concerns."""
        return Counter(moved.how for moved in self.reshaped)


def _parts(keys: Iterable[str]) -> Counter[str]:
    """Keys by the part of the network that they belong to."""
    return Counter(_part(key) for key in keys)


def _part(key: str) -> str:
    """The first two words of a key, without wrappers and layers' numbers."""
    words = [word for word in key.removeprefix("model.").split(".") if not re.fullmatch(r"\d+", word)]
    return words[0] if words[0] == "backbone" else ".".join(words[:2]) if len(words) > 2 else words[0]
