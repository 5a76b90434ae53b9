"""Homonyms: equal or similar names of two datasets that perhaps mean different things."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from metr.inspection.facts import DatasetFacts
from metr.inspection.similar_names import EmbeddingSimilarity, by_head, ending_in, squeezed

# Differences of box area, and of width / height, that are reported.
_LARGER, _WIDER = 5.0, 1.75
# Fewer boxes than these say nothing about a category.
_FEWEST = 5
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
    compare, or if the boxes differ much in size or shape.

    Args:
        facts: The datasets.
        embeddings: Of all names; with None only sizes and shapes are compared.
        far: The other names differ in meaning below this similarity.
    """
    homonyms: list[Homonym] = []
    for one, two in permutations(facts, 2):
        partners = _partners(one, two)
        if not partners:
            continue
        field = None if embeddings is None else _Domains.of(one, two, embeddings)
        for name, others in partners.items():
            reasons = [*_by_context(one, two, field, far), *_by_looks(name, one, others, two)]
            if reasons and not _is_reported(homonyms, name, one.name, others, two.name):
                homonym = Homonym(name=name, dataset=one.name, others=others, other=two.name, reasons=tuple(reasons))
                homonyms.append(homonym)
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


def _is_reported(homonyms: Iterable[Homonym], name: str, dataset: str, others: Sequence[str], other: str) -> bool:
    """Whether the pair was already reported from the other dataset's side."""
    return any(
        (homonym.dataset, homonym.other) == (other, dataset) and homonym.name in others and name in homonym.others
        for homonym in homonyms
    )
