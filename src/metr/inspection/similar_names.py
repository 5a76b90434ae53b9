"""Names of several datasets that may mean the same, and why one may think so."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from metr.inspection.embedding_similarity import EmbeddingSimilarity
from metr.inspection.string_similarity import has_head, spelt_alike

Kind = Literal["spelling", "abbreviation", "meaning", "sight"]

# A pair is left out where one of its names has another partner in the same dataset that is nearer by this much.
_MARGIN = 0.1
_ORDER: tuple[Kind, ...] = ("spelling", "abbreviation", "sight", "meaning")


@dataclass(frozen=True, kw_only=True)
class SimilarNames:
    """Two names that may mean the same; `owners` are the datasets that annotate the first, and the second."""

    names: tuple[str, str]
    owners: tuple[tuple[str, ...], tuple[str, ...]]
    kind: Kind
    why: str
    strength: float = 1.0


def similar_names(
    owners: Mapping[str, Sequence[str]], meanings: EmbeddingSimilarity | None, least: float
) -> tuple[SimilarNames, ...]:
    """Pairs of names that are near by spelling, or near in meaning and annotated by different datasets.

    Args:
        owners: The datasets that annotate each name.
        meanings: Embeddings of all names; None leaves spelling alone.
        least: The similarity from which names are near.
    """
    spelt = [
        _pair(one.first, one.second, owners, "abbreviation" if one.abbreviation else "spelling", one.why)
        for one in spelt_alike(tuple(owners))
        # a dataset that tells two names of several letters apart means to; one that has both spellings may not
        if one.why != "one letter apart" or not _together(one.first, one.second, owners)
    ]
    if meanings is None:
        return in_order(spelt)
    known = {pair.names for pair in spelt}
    meant = [
        _pair(one, two, owners, "meaning", _meant(one, two, strength), strength)
        for one, two, strength in meanings.pairs(least)
        if (one, two) not in known and not _together(one, two, owners)
    ]
    return in_order([*spelt, *_best(spelt, meant)])


def in_order(pairs: Sequence[SimilarNames]) -> tuple[SimilarNames, ...]:
    """The pairs, surest first."""
    return tuple(sorted(pairs, key=lambda pair: (_ORDER.index(pair.kind), -pair.strength)))


def _pair(
    one: str, two: str, owners: Mapping[str, Sequence[str]], kind: Kind, why: str, strength: float = 1.0
) -> SimilarNames:
    datasets = (tuple(owners[one]), tuple(owners[two]))
    return SimilarNames(names=(one, two), owners=datasets, kind=kind, why=why, strength=strength)


def _together(one: str, two: str, owners: Mapping[str, Sequence[str]]) -> bool:
    """Whether a dataset annotates both names, and so tells them apart."""
    return not set(owners[one]).isdisjoint(owners[two])


def _meant(one: str, two: str, strength: float) -> str:
    kind = next((f", perhaps a kind of {b}" for a, b in ((one, two), (two, one)) if has_head(a, b)), "")
    return f"near in meaning, {strength:.2f}{kind}"


def _best(spelt: Sequence[SimilarNames], meant: Sequence[SimilarNames]) -> list[SimilarNames]:
    """The pairs by meaning, without those of which one name has a clearly nearer partner in the other's dataset."""
    nearest: defaultdict[tuple[str, str], float] = defaultdict(float)
    for pair in (*spelt, *meant):
        for side in (0, 1):
            for dataset in pair.owners[1 - side]:
                key = (pair.names[side], dataset)
                nearest[key] = max(nearest[key], pair.strength)
    return [
        pair
        for pair in meant
        if all(
            pair.strength >= min(nearest[pair.names[side], dataset] for dataset in pair.owners[1 - side]) - _MARGIN
            for side in (0, 1)
        )
    ]
