"""Which dataset annotates which name, and where a name's objects perhaps stand unlabelled."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metr.inspection.detector_hints import Sights
from metr.inspection.facts import DatasetFacts
from metr.inspection.homonyms import Homonym
from metr.inspection.similar_names import EmbeddingSimilarity

# A name that stands beside common names so rarely, or in so few images, is no hint.
_BESIDE, _FEWEST_BESIDE, _LEAST_IMAGES = 0.15, 2, 5
# A detector that sees a name in fewer images, or in a smaller share of them, may err.
_SEEN, _FEWEST_SEEN = 0.05, 2


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Why a name's objects may stand unlabelled in a dataset: `strength` is a share of images, or a similarity.

    "seen": a detector finds it there. "beside": elsewhere it stands beside what the dataset shows. "akin": the dataset
    has a name that is near in meaning.
    """

    kind: Literal["seen", "beside", "akin"]
    strength: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One name in one dataset: its boxes if it is annotated (`partly`: not in every image), else the hints."""

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
    homonyms: Sequence[Homonym],
    meanings: EmbeddingSimilarity | None,
    sights: Sights | None,
    akin: float,
) -> Coverage:
    """Fills the matrix. With a detector its sightings are the hints, else what stands together and what words tell.

    Args:
        facts: The datasets.
        homonyms: Pairs of names that are no hints for one another.
        meanings: Embeddings of all names, or None.
        sights: What a detector found, or None.
        akin: The similarity from which a unannotated name may stand in a dataset under another name.
    """
    cells = {
        (one.name, name): Cell(boxes=category.count, partly=category.annotated < 1)
        for one in facts
        for name, category in one.names.items()
    }
    hints: dict[tuple[str, str], dict[str, Hint]] = {}
    found = _seen(sights) if sights is not None else _told(facts, homonyms, meanings, akin)
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
        share = one.images / one.of
        if one.images >= _FEWEST_SEEN and share >= _SEEN:
            why = f"seen in {one.images} of {one.of} images, such as {one.example}"
            yield one.dataset, one.name, Hint(kind="seen", strength=share, why=why)


def _told(
    facts: Sequence[DatasetFacts], homonyms: Sequence[Homonym], meanings: EmbeddingSimilarity | None, akin: float
) -> _Told:
    for here in facts:
        for there in facts:
            if here is there:
                continue
            yield from _beside(here, there, homonyms)
            if meanings is not None:
                yield from _akin(here, there, homonyms, meanings, akin)


def _beside(here: DatasetFacts, there: DatasetFacts, homonyms: Sequence[Homonym]) -> _Told:
    """Names that stand, in the images of `there`, beside the names that both datasets annotate."""
    labels = {name: label for label, name in enumerate(there.names)}
    common = [name for name in there.names if name in here.names and not _doubted(homonyms, name, name, here, there)]
    if not common or not len(there.shown):
        return
    bridges = there.shown[np.isin(there.shown[:, 1], [labels[name] for name in common])]
    images = np.unique(bridges[:, 0])
    if len(images) < _LEAST_IMAGES:
        return
    beside = there.shown[np.isin(there.shown[:, 0], images)]
    counts = np.bincount(beside[:, 1], minlength=len(labels))
    for name, label in labels.items():
        count = int(counts[label])
        if name not in here.names and count >= _FEWEST_BESIDE and count / len(images) >= _BESIDE:
            shown = " or ".join(common[:3]) + (" or others" if len(common) > 3 else "")
            why = f"in {there.name} it is in {count:,} of {len(images):,} images with {shown}"
            yield here.name, name, Hint(kind="beside", strength=count / len(images), why=why)


def _akin(
    here: DatasetFacts, there: DatasetFacts, homonyms: Sequence[Homonym], meanings: EmbeddingSimilarity, akin: float
) -> _Told:
    """Names of `there` that are near in meaning to one of `here` that `there` does not tell from it."""
    own = [name for name in here.names if name not in there.names]
    unannotated = [name for name in there.names if name not in here.names]
    if not own or not unannotated:
        return
    table = meanings.between(unannotated, own)
    for row, name in enumerate(unannotated):
        place = int(table[row].argmax())
        strength = float(table[row, place])
        if strength >= akin and not _doubted(homonyms, own[place], name, here, there):
            why = f"perhaps there as {own[place]} (near in meaning, {strength:.2f})"
            yield here.name, name, Hint(kind="akin", strength=strength, why=why)


def _doubted(homonyms: Sequence[Homonym], one: str, two: str, here: DatasetFacts, there: DatasetFacts) -> bool:
    datasets = {here.name, there.name}
    return any({homonym.dataset, homonym.other} == datasets and homonym.between(one, two) for homonym in homonyms)


def _evidence(meanings: EmbeddingSimilarity | None, sights: Sights | None) -> str:
    if sights is not None:
        looked = sorted(set(sights.images.values()))
        number = f"{looked[0]}" if len(looked) == 1 else f"{looked[0]} to {looked[-1]}"
        told = f"seen by {sights.model} where no box is, in {number} images of each dataset"
        unjudged = len(sights.unjudged)
        return told + (
            f"; {unjudged:,} names that it hardly finds even where annotated are not judged" if unjudged else ""
        )
    told = ", or whose words are near" if meanings is not None else ""
    return f"weak hints: names that elsewhere stand beside common ones{told}; --model RUN looks at images"
