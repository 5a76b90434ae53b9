"""Which dataset annotates which name, and where a name's objects perhaps stand unlabelled."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metr.api.inspection.doubts import Doubt
from metr.api.inspection.facts import DatasetFacts
from metr.api.inspection.meanings import Meanings
from metr.api.inspection.sight import Sights

# A name that stands beside common names so rarely, or in so few pictures, is no hint.
_BESIDE, _FEWEST_BESIDE, _LEAST_PICTURES = 0.15, 2, 5
# A detector that sees a name in fewer pictures, or in a smaller share of them, may err.
_SEEN, _FEWEST_SEEN = 0.05, 2


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Why a name's objects may stand unlabelled in a dataset: `strength` is a share of pictures, or a similarity.

    "seen": a detector finds it there. "beside": elsewhere it stands beside what the dataset shows. "akin": the dataset
    has a name that is near in meaning.
    """

    kind: Literal["seen", "beside", "akin"]
    strength: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One name in one dataset: its boxes if it is annotated (`partly`: not in every picture), else the hints."""

    boxes: int | None = None
    partly: bool = False
    hints: tuple[Hint, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The matrix of datasets and names. What `cells` lacks is neither annotated nor to be expected.

    `evidence` says what the hints rest on.
    """

    datasets: tuple[str, ...]
    names: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    evidence: str

    def cell(self, dataset: str, name: str) -> Cell:
        """One name in one dataset."""
        return self.cells.get((dataset, name), Cell())

    def telling(self) -> list[str]:
        """The names that several datasets annotate or perhaps show, those that most annotate first."""
        found: dict[str, list[Cell]] = {name: [] for name in self.names}
        for (_, name), cell in self.cells.items():
            found[name].append(cell)
        annotated = {name: sum(cell.boxes is not None for cell in cells) for name, cells in found.items()}
        several = [name for name in self.names if len(found[name]) > 1]
        return sorted(several, key=lambda name: (-annotated[name], -len(found[name])))

    def hinted(self, dataset: str) -> list[tuple[str, Cell]]:
        """The names that perhaps stand unlabelled in a dataset, likeliest first."""
        found = [(name, self.cell(dataset, name)) for name in self.names]
        return sorted(
            ((name, cell) for name, cell in found if cell.hints),
            key=lambda item: -max(h.strength for h in item[1].hints),
        )


def coverage_of(
    facts: Sequence[DatasetFacts],
    doubts: Sequence[Doubt],
    meanings: Meanings | None,
    sights: Sights | None,
    akin: float,
) -> Coverage:
    """Fills the matrix. With a detector its sightings are the hints, else what stands together and what words tell.

    Args:
        facts: The datasets.
        doubts: Pairs of names that are no hints for one another.
        meanings: Embeddings of all names, or None.
        sights: What a detector found, or None.
        akin: The similarity from which a foreign name may stand in a dataset under another name.
    """
    cells = {
        (one.name, name): Cell(boxes=category.count, partly=category.annotated < 1)
        for one in facts
        for name, category in one.names.items()
    }
    hints: dict[tuple[str, str], dict[str, Hint]] = {}
    found = _seen(sights) if sights is not None else _told(facts, doubts, meanings, akin)
    for dataset, name, hint in found:
        mine = hints.setdefault((dataset, name), {})
        mine[hint.kind] = max(hint, mine.get(hint.kind, hint), key=lambda one: one.strength)
    cells |= {key: Cell(hints=tuple(told.values())) for key, told in hints.items() if key not in cells}
    names = dict.fromkeys(name for one in facts for name in one.names)
    return Coverage(
        datasets=tuple(one.name for one in facts), names=tuple(names), cells=cells, evidence=_evidence(meanings, sights)
    )


_Told = Iterator[tuple[str, str, Hint]]


def _seen(sights: Sights) -> _Told:
    for one in sights.sightings:
        share = one.pictures / one.of
        if one.pictures >= _FEWEST_SEEN and share >= _SEEN:
            why = f"seen in {one.pictures} of {one.of} pictures, such as {one.example}"
            yield one.dataset, one.name, Hint(kind="seen", strength=share, why=why)


def _told(facts: Sequence[DatasetFacts], doubts: Sequence[Doubt], meanings: Meanings | None, akin: float) -> _Told:
    for here in facts:
        for there in facts:
            if here is there:
                continue
            yield from _beside(here, there, doubts)
            if meanings is not None:
                yield from _akin(here, there, doubts, meanings, akin)


def _beside(here: DatasetFacts, there: DatasetFacts, doubts: Sequence[Doubt]) -> _Told:
    """Names that stand, in the pictures of `there`, beside the names that both datasets annotate."""
    labels = {name: label for label, name in enumerate(there.names)}
    common = [name for name in there.names if name in here.names and not _doubted(doubts, name, name, here, there)]
    if not common or not len(there.shown):
        return
    bridges = there.shown[np.isin(there.shown[:, 1], [labels[name] for name in common])]
    pictures = np.unique(bridges[:, 0])
    if len(pictures) < _LEAST_PICTURES:
        return
    beside = there.shown[np.isin(there.shown[:, 0], pictures)]
    counts = np.bincount(beside[:, 1], minlength=len(labels))
    for name, label in labels.items():
        count = int(counts[label])
        if name not in here.names and count >= _FEWEST_BESIDE and count / len(pictures) >= _BESIDE:
            shown = " or ".join(common[:3]) + (" or others" if len(common) > 3 else "")
            why = f"in {there.name} it is in {count:,} of {len(pictures):,} pictures with {shown}"
            yield here.name, name, Hint(kind="beside", strength=count / len(pictures), why=why)


def _akin(here: DatasetFacts, there: DatasetFacts, doubts: Sequence[Doubt], meanings: Meanings, akin: float) -> _Told:
    """Names of `there` that are near in meaning to one of `here` that `there` does not tell from it."""
    own = [name for name in here.names if name not in there.names]
    foreign = [name for name in there.names if name not in here.names]
    if not own or not foreign:
        return
    table = meanings.between(foreign, own)
    for row, name in enumerate(foreign):
        place = int(table[row].argmax())
        strength = float(table[row, place])
        if strength >= akin and not _doubted(doubts, own[place], name, here, there):
            why = f"perhaps there as {own[place]} (near in meaning, {strength:.2f})"
            yield here.name, name, Hint(kind="akin", strength=strength, why=why)


def _doubted(doubts: Sequence[Doubt], one: str, two: str, here: DatasetFacts, there: DatasetFacts) -> bool:
    datasets = {here.name, there.name}
    return any({doubt.dataset, doubt.other} == datasets and doubt.between(one, two) for doubt in doubts)


def _evidence(meanings: Meanings | None, sights: Sights | None) -> str:
    if sights is not None:
        looked = sorted(set(sights.pictures.values()))
        number = f"{looked[0]}" if len(looked) == 1 else f"{looked[0]} to {looked[-1]}"
        told = f"seen by {sights.model} where no box is, in {number} pictures of each dataset"
        unjudged = len(sights.unjudged)
        return told + (
            f"; {unjudged:,} names that it hardly finds even where annotated are not judged" if unjudged else ""
        )
    told = ", or whose words are near" if meanings is not None else ""
    return f"weak hints: names that elsewhere stand beside common ones{told}; --model RUN looks at pictures"
