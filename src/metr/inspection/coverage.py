"""The coverage matrix of datasets and names, and homonyms: equal names that perhaps mean different things."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

from metr.errors import counted
from metr.inspection.detector_hints import DetectorHints
from metr.inspection.facts import DatasetFacts
from metr.inspection.similar_names import SimilarNames
from metr.text.similar_names import EmbeddingSimilarity, by_head, ending_in, has_head, squeezed, symbol_of

# Fewer other names than these say nothing about what a dataset shows.
_CONTEXT = 2
# Datasets with this fraction of their other names in common belong to one domain.
_ONE_DOMAIN = 0.5


@dataclass(frozen=True, kw_only=True)
class Homonym:
    """`name` of `dataset` and the names `others` of the dataset `other`, which are equal to it or end in it."""

    name: str
    dataset: str
    others: tuple[str, ...]
    other: str
    reasons: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both datasets have exactly the same name, so that training takes it as one category."""
        return self.others == (self.name,)

    def between(self, one: str, two: str) -> bool:
        """Whether the homonym is about these two names."""
        return (one == self.name and two in self.others) or (two == self.name and one in self.others)


def homonyms_of(
    facts: Sequence[DatasetFacts], embeddings: EmbeddingSimilarity | None, far: float
) -> tuple[Homonym, ...]:
    """Finds equal names, and names that end in another (`king`, `white-king`), that perhaps mean different things.

    A pair is reported if the other names of the two datasets differ in meaning, if a dataset has no other names to
    compare, or if the name is a letter or a number, which says nothing by itself. The sizes of the boxes are no
    reason: they tell how near the camera was.

    Args:
        facts: The datasets.
        embeddings: Of all names; None: names are not compared in meaning.
        far: The other names differ in meaning below this similarity.
    """
    homonyms: list[Homonym] = []
    for one, two in permutations(facts, 2):
        partners = _partners(one, two)
        if not partners:
            continue
        field = None if embeddings is None else _Domains.of(one, two, embeddings)
        by_context = _by_context(one, two, field, far)
        for name, others in partners.items():
            reasons = (*by_context, *_by_symbol(name, one, two))
            if reasons and not _is_reported(homonyms, name, one.name, others, two.name):
                homonyms.append(Homonym(name=name, dataset=one.name, others=others, other=two.name, reasons=reasons))
    return tuple(homonyms)


@dataclass(frozen=True, kw_only=True)
class _Domains:
    """How similar two datasets are, apart from the names that are compared.

    `common` is the fraction of the smaller dataset's names that both have; `closeness` is the similarity of the names
    that only one of them has, or None where these are too few.
    """

    common: float
    closeness: float | None

    @classmethod
    def of(cls, one: DatasetFacts, two: DatasetFacts, embeddings: EmbeddingSimilarity) -> "_Domains":
        first, second = tuple(one.names), tuple(two.names)
        equal = {squeezed(name) for name in first} & {squeezed(name) for name in second}
        others = min(len(first), len(second)) - 1
        common = max(0, len(equal) - 1) / others if others else 0.0
        told = _partners(one, two) | _partners(two, one)
        alike = {*told, *(name for names in told.values() for name in names)}
        first, second = (tuple(name for name in names if name not in alike) for names in (first, second))
        if min(len(first), len(second)) < _CONTEXT:
            return cls(common=common, closeness=None)
        rest = embeddings.between(first, second)
        return cls(common=common, closeness=float(max(rest.max(axis=0).mean(), rest.max(axis=1).mean())))


def _partners(one: DatasetFacts, two: DatasetFacts) -> dict[str, tuple[str, ...]]:
    """For each name of `one`: the same name in `two`, or its other spellings, or those that end in it."""
    heads = by_head(name for name in two.names if name not in one.names)
    by_spelling: dict[str, list[str]] = {}
    for name in two.names:
        by_spelling.setdefault(squeezed(name), []).append(name)
    partners = {
        name: (name,) if name in two.names else tuple(by_spelling.get(squeezed(name), ())) or ending_in(name, heads)
        for name in one.names
    }
    return {name: others for name, others in partners.items() if others}


def _by_context(one: DatasetFacts, two: DatasetFacts, field: _Domains | None, far: float) -> list[str]:
    if field is None or field.common >= _ONE_DOMAIN:
        return []
    if field.closeness is None:
        lone = [facts.name for facts in (one, two) if len(facts.names) == 1]
        return [f"no other name to judge by in {' and '.join(lone)}"] if lone else []
    if field.closeness < far:
        return [f"the other names are far apart in meaning ({field.closeness:.2f}, below {far:.2f})"]
    return []


def _by_symbol(name: str, one: DatasetFacts, two: DatasetFacts) -> list[str]:
    """A letter or number, unless the datasets have the same ones, as two datasets of handwritten digits do."""
    if symbol_of(name) is None:
        return []
    others = min(len(one.names), len(two.names)) - 1
    common = len(one.names.keys() & two.names.keys() - {name})
    return [] if others and common / others >= _ONE_DOMAIN else ["a letter or number alone does not say what it is"]


def _is_reported(homonyms: Iterable[Homonym], name: str, dataset: str, others: Sequence[str], other: str) -> bool:
    """Whether the pair was already reported from the other dataset's side."""
    return any(
        (homonym.dataset, homonym.other) == (other, dataset) and homonym.name in others and name in homonym.others
        for homonym in homonyms
    )


# Least fraction of images, number of those, and of images in all, for a name that occurs with common names.
_BESIDE, _FEWEST_BESIDE, _LEAST_IMAGES = 0.15, 2, 5
# Least fraction and number of images in which a detector must find a name.
_SEEN, _FEWEST_SEEN = 0.05, 2


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Why objects of a name may be unlabelled in a dataset; `strength` is a fraction of images.

    "seen": a detector finds it there. "beside": in another dataset it occurs in images with names of this one.
    """

    kind: Literal["seen", "beside"]
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
    """The matrix of datasets and names. Pairs missing in `cells` are neither annotated nor hinted at.

    `evidence` says what the hints are based on.
    """

    datasets: tuple[str, ...]
    names: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    evidence: str

    def cell(self, dataset: str, name: str) -> Cell:
        """One name in one dataset."""
        return self.cells.get((dataset, name), Cell())

    def telling(self) -> list[str]:
        """Names annotated or hinted at in several datasets, the most annotated first."""
        found: dict[str, list[Cell]] = {name: [] for name in self.names}
        for (_, name), cell in self.cells.items():
            found[name].append(cell)
        annotated = {name: sum(cell.boxes is not None for cell in cells) for name, cells in found.items()}
        several = [name for name in self.names if len(found[name]) > 1]
        return sorted(several, key=lambda name: (-annotated[name], -len(found[name])))

    def hinted(self, dataset: str) -> list[tuple[str, Cell]]:
        """The names that are perhaps unlabelled in a dataset, the most likely first."""
        found = [(name, self.cell(dataset, name)) for name in self.names]
        return sorted(
            ((name, cell) for name, cell in found if cell.hints),
            key=lambda item: -max(h.strength for h in item[1].hints),
        )


def coverage_of(
    facts: Sequence[DatasetFacts],
    near: Sequence[SimilarNames],
    homonyms: Sequence[Homonym],
    detector_hints: DetectorHints | None,
) -> Coverage:
    """Fills the matrix. Hints come from a detector if one was run, else from names that occur together.

    Args:
        facts: The datasets.
        near: Names that may mean the same. A name is not missing where the dataset annotates another that may mean it.
        homonyms: Pairs of names that give no hints about each other.
        detector_hints: What a detector found, or None.
    """
    cells = {
        (one.name, name): Cell(boxes=category.count, partly=category.annotated < 1)
        for one in facts
        for name, category in one.names.items()
    }
    # who annotates stop signs may well leave out other signs
    equal = [pair.names for pair in near if not (has_head(*pair.names) or has_head(*pair.names[::-1]))]
    same = {*equal, *(names[::-1] for names in equal)}
    known = {(one.name, other) for one in facts for name, other in same if name in one.names}
    hints: dict[tuple[str, str], dict[str, Hint]] = {}
    found = _seen(detector_hints) if detector_hints is not None else _from_names(facts, homonyms)
    for dataset, name, hint in (one for one in found if one[:2] not in known):
        mine = hints.setdefault((dataset, name), {})
        mine[hint.kind] = max(hint, mine.get(hint.kind, hint), key=lambda one: one.strength)
    cells |= {key: Cell(hints=tuple(told.values())) for key, told in hints.items() if key not in cells}
    names = dict.fromkeys(name for one in facts for name in one.names)
    return Coverage(
        datasets=tuple(one.name for one in facts),
        names=tuple(names),
        cells=cells,
        evidence=_evidence(detector_hints),
    )


_Hints = Iterator[tuple[str, str, Hint]]


def _seen(detector_hints: DetectorHints) -> _Hints:
    for one in detector_hints.unlabelled:
        share = one.images / one.of
        if one.images >= _FEWEST_SEEN and share >= _SEEN:
            why = f"seen in {one.images} of {counted(one.of, 'image')}, such as {one.example}"
            yield one.dataset, one.name, Hint(kind="seen", strength=share, why=why)


def _from_names(facts: Sequence[DatasetFacts], homonyms: Sequence[Homonym]) -> _Hints:
    for here, there in permutations(facts, 2):
        yield from _beside(here, there, homonyms)


def _beside(here: DatasetFacts, there: DatasetFacts, homonyms: Sequence[Homonym]) -> _Hints:
    """Names that occur, in images of `there`, with names that both datasets annotate."""
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


def _doubted(homonyms: Sequence[Homonym], one: str, two: str, here: DatasetFacts, there: DatasetFacts) -> bool:
    datasets = {here.name, there.name}
    return any({homonym.dataset, homonym.other} == datasets and homonym.between(one, two) for homonym in homonyms)


def _evidence(detector_hints: DetectorHints | None) -> str:
    if detector_hints is None:
        return "weak hints: names that elsewhere stand beside common ones; --model RUN looks at images"
    looked = sorted(set(detector_hints.images.values()))
    number = counted(looked[0], "image") if len(looked) == 1 else f"{looked[0]} to {looked[-1]} images"
    told = f"seen by {detector_hints.model} where no box is, in {number} of each dataset"
    if detector_hints.unreliable:
        unreliable = counted(len(detector_hints.unreliable), "name is", "names are")
        told += f"; {unreliable} left out, because it hardly finds them even where annotated"
    if detector_hints.unknown:
        told += f"; no hints about {', '.join(detector_hints.unknown)}, whose own boxes it hardly finds"
    return told
