"""Names that datasets share, or nearly so, and that perhaps do not mean the same things."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from metr.inspection.facts import DatasetFacts
from metr.inspection.similar_names import EmbeddingSimilarity, by_head, ending_in, squeezed

# Boxes that are so many times larger in area, or wider for their height, are told.
_LARGER, _WIDER = 5.0, 1.75
# Fewer boxes than these say nothing about a category.
_FEWEST = 5
# Fewer other names than these say nothing about what a dataset shows.
_CONTEXT = 2
# Datasets that have this share of their other names in common are of one field.
_ONE_FIELD = 0.5


@dataclass(frozen=True, kw_only=True)
class Homonym:
    """`name` in `dataset`, and `others` in `other`: equal, or ending in it, but perhaps not the same thing."""

    name: str
    dataset: str
    others: tuple[str, ...]
    other: str
    reasons: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the datasets have the very same name, which makes it one category."""
        return self.others == (self.name,)

    def between(self, one: str, two: str) -> bool:
        """Whether the homonym is about these two names."""
        return (one == self.name and two in self.others) or (two == self.name and one in self.others)


def homonyms_of(facts: Sequence[DatasetFacts], meanings: EmbeddingSimilarity | None, far: float) -> tuple[Homonym, ...]:
    """Equal names, and bare ones with what ends in them (`king`, `white-king`), that are perhaps different things.

    A name is doubted where the other names of the two datasets are far apart in meaning, where a dataset has no other
    names to judge by, or where the boxes differ much in size or shape.

    Args:
        facts: The datasets.
        meanings: Embeddings of all names; None leaves sizes and shapes alone.
        far: The similarity of the other names below which they are far apart.
    """
    homonyms: list[Homonym] = []
    for one, two in permutations(facts, 2):
        partners = _partners(one, two)
        if not partners:
            continue
        field = None if meanings is None else _Fields.of(one, two, meanings)
        for name, others in partners.items():
            reasons = [*_by_context(one, two, field, far), *_by_looks(name, one, others, two)]
            if reasons and not _said(homonyms, name, one.name, others, two.name):
                homonym = Homonym(name=name, dataset=one.name, others=others, other=two.name, reasons=tuple(reasons))
                homonyms.append(homonym)
    return tuple(homonyms)


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """What two datasets speak of apart from the names that are alike.

    `common` is the share of the smaller dataset's names that the other has too, `closeness` how near the names are that
    only one of them has; None where there are too few.
    """

    common: float
    closeness: float | None

    @classmethod
    def of(cls, one: DatasetFacts, two: DatasetFacts, meanings: EmbeddingSimilarity) -> "_Fields":
        first, second = tuple(one.names), tuple(two.names)
        equal = {squeezed(name) for name in first} & {squeezed(name) for name in second}
        others = min(len(first), len(second)) - 1
        common = max(0, len(equal) - 1) / others if others else 0.0
        told = _partners(one, two) | _partners(two, one)
        alike = {*told, *(name for names in told.values() for name in names)}
        first, second = (tuple(name for name in names if name not in alike) for names in (first, second))
        if min(len(first), len(second)) < _CONTEXT:
            return cls(common=common, closeness=None)
        rest = meanings.between(first, second)
        return cls(common=common, closeness=float(max(rest.max(axis=0).mean(), rest.max(axis=1).mean())))


def _partners(one: DatasetFacts, two: DatasetFacts) -> dict[str, tuple[str, ...]]:
    """For each name of `one`: the same name in `two`, or its other spellings, or those that end in it."""
    heads = by_head(name for name in two.names if name not in one.names)
    spelt: dict[str, list[str]] = {}
    for name in two.names:
        spelt.setdefault(squeezed(name), []).append(name)
    partners = {
        name: (name,) if name in two.names else tuple(spelt.get(squeezed(name), ())) or ending_in(name, heads)
        for name in one.names
    }
    return {name: others for name, others in partners.items() if others}


def _by_context(one: DatasetFacts, two: DatasetFacts, field: _Fields | None, far: float) -> list[str]:
    if field is None or field.common >= _ONE_FIELD:
        return []
    if field.closeness is None:
        lone = [facts.name for facts in (one, two) if len(facts.names) == 1]
        return [f"no other name to judge by in {' and '.join(lone)}"] if lone else []
    if field.closeness < far:
        return [f"the other names are far apart in meaning ({field.closeness:.2f}, below {far:.2f})"]
    return []


def _by_looks(name: str, one: DatasetFacts, others: Sequence[str], two: DatasetFacts) -> list[str]:
    mine, theirs = one.names[name], [two.names[other] for other in others]
    theirs = [facts for facts in theirs if facts.count >= _FEWEST and facts.side and facts.aspect]
    if mine.count < _FEWEST or not mine.side or not mine.aspect or not theirs:
        return []
    side, aspect = (float(np.median([getattr(facts, key) for facts in theirs])) for key in ("side", "aspect"))
    reasons = []
    area = (mine.side / side) ** 2
    if max(area, 1 / area) >= _LARGER:
        where = one.name if area > 1 else two.name
        reasons.append(f"boxes {max(area, 1 / area):.0f} times larger in {where}")
    shape = mine.aspect / aspect
    if max(shape, 1 / shape) >= _WIDER:
        where = one.name if shape > 1 else two.name
        reasons.append(f"boxes {max(shape, 1 / shape):.1f} times wider for their height in {where}")
    return reasons


def _said(homonyms: Iterable[Homonym], name: str, dataset: str, others: Sequence[str], other: str) -> bool:
    """Whether a homonym was told from the other dataset's side."""
    return any(
        (homonym.dataset, homonym.other) == (other, dataset) and homonym.name in others and name in homonym.others
        for homonym in homonyms
    )
