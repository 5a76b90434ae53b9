"""Weights from METR to another detector and back: one table, read in either direction, and a report of every tensor."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from metr.conversion.table import Row, State, to_ours, to_theirs
from metr.conversion.targets.base import Derived
from metr.errors import CheckpointError, ModelError

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
    """What became of every weight.

    Attributes:
        source: The detector that gave weights.
        receiver: The detector that received them.
        copied: Tensors copied bit by bit.
        reshaped: Tensors stacked, cut, fitted or computed from the giver's.
        afresh: The receiver's tensors that keep their own initialisation.
        left_over: The giver's tensors that were not used.
        notes: What a reader should know: what differs in spite of equal weights, what did not fit and why.
        start: Why the result is a start for training and no detector yet; empty where it is one.
        fitted_to: How many images it was fitted to, so that it finds most of what the giver finds.
        taught: How many steps taught it what the giver finds in these.
        differences: Why it does not find exactly what the giver finds.
    """

    source: str
    receiver: str
    copied: tuple[Moved, ...]
    reshaped: tuple[Moved, ...]
    afresh: tuple[str, ...]
    left_over: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    start: str = ""
    fitted_to: int = 0
    taught: int = 0
    differences: tuple[str, ...] = ()

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
            "start": self.start,
            "fitted to images": self.fitted_to,
            "taught in steps": self.taught,
            "differences": list(self.differences),
            "copied": {moved.key: list(moved.source) for moved in self.copied},
            "reshaped": {moved.key: {"from": list(moved.source), "how": moved.how} for moved in self.reshaped},
            "afresh": list(self.afresh),
            "left over": list(self.left_over),
        }

    def table(self) -> Table:
        """Tensors by part of the receiver (and of the giver, for what is left over), to be printed."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class StateTransfer:
    """What one detector gives another: tensors under the receiver's names, with where they come from.

    `left_over` are the giver's keys that were not used.
    """

    state: State
    moved: tuple[Moved, ...]
    left_over: tuple[str, ...]


def and_derived(given: StateTransfer, derived: Mapping[str, Derived]) -> StateTransfer:
    """What was given, and tensors that were derived from it besides."""
    moved = (*given.moved, *(Moved(key=key, source=one.source, how=one.how) for key, one in derived.items()))
    used = {source for one in moved for source in one.source}
    return StateTransfer(
        state=given.state | {key: one.tensor for key, one in derived.items()},
        moved=moved,
        left_over=tuple(key for key in given.left_over if key not in used),
    )


def giving_to_theirs(ours: Mapping[str, Tensor], rows: Sequence[Row], derived: Mapping[str, Derived]) -> StateTransfer:
    """METR's state under another detector's names; what is derived goes before what is copied."""
    converted = to_theirs(ours, rows)
    sources = _sources(ours, rows)
    state = converted.state | {key: one.tensor for key, one in derived.items()}
    moved = []
    for key in state:
        if key in derived:
            moved.append(Moved(key=key, source=derived[key].source, how=derived[key].how))
        else:
            how = "stacked" if len(sources[key]) > 1 else ""
            moved.append(Moved(key=key, source=sources[key], how=how))
    return StateTransfer(state=state, moved=tuple(moved), left_over=_left_over(ours, moved))


def giving_to_ours(theirs: Mapping[str, Tensor], rows: Sequence[Row], derived: Mapping[str, Derived]) -> StateTransfer:
    """Another detector's state under METR's names; what is derived goes before what is copied.

    Raises:
        CheckpointError: two of their keys claim the same name of ours.
    """
    moved, state = [], dict[str, Tensor]()
    for key in theirs:
        # one at a time, so that every part is known to come from it
        pieces = to_ours({key: theirs[key]}, rows).state
        for name, piece in pieces.items():
            if name in state:
                raise CheckpointError(f"two keys become {name!r}", where=key, hint="check the key table")
            if name not in derived:
                state[name] = piece
                moved.append(Moved(key=name, source=(key,), how="unstacked" if len(pieces) > 1 else ""))
    for name, one in derived.items():
        state[name] = one.tensor
        moved.append(Moved(key=name, source=one.source, how=one.how))
    return StateTransfer(state=state, moved=tuple(moved), left_over=_left_over(theirs, moved))


def receive(
    receiver: nn.Module, given: StateTransfer, *, source: str, name: str, notes: Sequence[str] = ()
) -> TransferReport:
    """Loads what was given as far as it fits, and reports every tensor of both sides.

    A tensor of another shape stays behind. Tensors that the receiver keeps under several names are counted once.

    Raises:
        ModelError: nothing fits at all.
    """
    own = receiver.state_dict()
    fitting = {key: tensor for key, tensor in given.state.items() if key in own and own[key].shape == tensor.shape}
    if not fitting:
        raise ModelError(f"no weight of {source} fits {name}", hint="were they trained with another backbone and size?")
    with torch.no_grad():
        receiver.load_state_dict({key: tensor.to(own[key]) for key, tensor in fitting.items()}, strict=False)
    moved = [one for one in given.moved if one.key in fitting]
    reached = {_place(own[key]) for key in fitting}
    taken = {key for one in moved for key in one.source}
    lost = [one for one in given.moved if one.key not in fitting]
    misshapen = tuple(_misfit(one.key, given.state[one.key], own) for one in lost)
    return TransferReport(
        source=source,
        receiver=name,
        copied=tuple(one for one in moved if not one.how),
        reshaped=tuple(one for one in moved if one.how),
        afresh=tuple(key for key in own if _place(own[key]) not in reached),
        left_over=tuple(dict.fromkeys([*given.left_over, *(k for one in lost for k in one.source if k not in taken)])),
        notes=(*notes, *misshapen),
    )


def _left_over(giver: Mapping[str, Tensor], moved: Iterable[Moved]) -> tuple[str, ...]:
    """The keys that no moved tensor was made from, under whichever of its names."""
    used = {id(giver[source]) for one in moved for source in one.source}
    return tuple(key for key, tensor in giver.items() if id(tensor) not in used)


def _misfit(key: str, tensor: Tensor, own: Mapping[str, Tensor]) -> str:
    if key not in own:
        return f"{key}: the receiver has none"
    return f"{key}: expected {list(own[key].shape)}, found {list(tensor.shape)}"


def _place(tensor: Tensor) -> Any:
    """A key that is equal for one tensor under several names. Empty tensors have no address."""
    return tensor.data_ptr() or id(tensor)


def _sources(ours: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Which of our keys go into each of theirs."""
    found = dict[str, tuple[str, ...]]()
    for row in rows:
        for key in ours:
            match = row.match(key)
            if match is not None:
                found[row.theirs.format(**match)] = tuple(part.format(**match) for part in row.parts)
    return found


def show(report: TransferReport, out: Path, console: Console, go_on: str) -> None:
    """The table of the report, what a reader should know, where everything is, and how to go on from a start."""
    console.print(f"{report.source} to {report.receiver}: tensors", style="italic", markup=False, highlight=False)
    console.print(report.table())
    for note in report.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    ways = ", ".join(f"{how} ({number})" for how, number in report.reshapings().items())
    if ways:
        console.print(f"- reshaped: {ways}", highlight=False, markup=False)
    console.print(f"the detector is in {out}", highlight=False, markup=False, soft_wrap=True)
    why = "".join(f"\n- {one}" for one in report.differences)
    if report.fitted_to:
        taught = f" and taught in {report.taught} steps" if report.taught else ""
        start = (
            f"It finds most of what {report.source} finds: it was fitted to {report.fitted_to} images{taught}. "
            f"To see how much: metr evaluate {out} DATA{why}\n{go_on}"
        )
    elif report.start:
        start = f"It is a start for training, no detector yet: {report.start}.\n{go_on}"
    elif report.differences:
        start = f"It finds much of what {report.source} finds, before any training, but not all alike:{why}\n{go_on}"
    else:
        start = f"It finds what {report.source} finds, before any training.\n{go_on}"
    console.print(start, highlight=False, markup=False, soft_wrap=True)
