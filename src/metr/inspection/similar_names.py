"""Names of several datasets that may mean the same, and why one may think so."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from metr.data.datasets_file import DatasetSource
from metr.text.similar_names import EmbeddingSimilarity, has_head, spelling_matches, symbol_of
from metr.text.vocabulary import Vocabulary


def joint_vocabulary(sources: Sequence[DatasetSource]) -> Vocabulary:
    """All names with their prompts; where datasets give a name different prompts, the first one is taken."""
    names = dict.fromkeys(name for source in sources for name in source.categories)
    prompts: dict[str, str] = {}
    for source in sources:
        for name, prompt in source.config.prompts.items():
            prompts.setdefault(name, prompt)
    return Vocabulary.of(tuple(names), prompts)


def owners_of(sources: Sequence[DatasetSource]) -> Mapping[str, tuple[str, ...]]:
    """The datasets that annotate each name."""
    owners: dict[str, list[str]] = {}
    for source in sources:
        for name in source.categories:
            owners.setdefault(name, []).append(source.name)
    return {name: tuple(datasets) for name, datasets in owners.items()}


Kind = Literal["spelling", "abbreviation", "embedding", "detector"]

# A pair is left out where one of its names has another partner in the same dataset that is nearer by this much.
_MARGIN = 0.1
_ORDER: tuple[Kind, ...] = ("spelling", "abbreviation", "detector", "embedding")


@dataclass(frozen=True, kw_only=True)
class SimilarNames:
    """Two names that may mean the same; `owners` are the datasets that annotate the first, and the second."""

    names: tuple[str, str]
    owners: tuple[tuple[str, ...], tuple[str, ...]]
    kind: Kind
    why: str
    strength: float = 1.0


def similar_names(
    owners: Mapping[str, Sequence[str]], embeddings: EmbeddingSimilarity | None, least: float
) -> tuple[SimilarNames, ...]:
    """Pairs of names that are near by spelling, or near in meaning and annotated by different datasets.

    Args:
        owners: The datasets that annotate each name.
        embeddings: Embeddings of all names; None leaves spelling alone.
        least: The similarity from which names are near.
    """
    by_spelling = [
        _pair(one.first, one.second, owners, "abbreviation" if one.abbreviation else "spelling", one.why)
        for one in spelling_matches(tuple(owners))
        # a dataset that tells two names of several letters apart means to; one that has both spellings may not
        if one.why != "one letter apart" or not _together(one.first, one.second, owners)
    ]
    if embeddings is None:
        return in_order(by_spelling)
    known = {pair.names for pair in by_spelling}
    meant = [
        _pair(one, two, owners, "embedding", _meant(one, two, strength), strength)
        for one, two, strength in embeddings.pairs(least)
        # a language model puts 9 and ten close together
        if (one, two) not in known and not _together(one, two, owners) and symbol_of(one) == symbol_of(two)
    ]
    return in_order([*by_spelling, *_best(by_spelling, meant)])


def in_order(pairs: Sequence[SimilarNames]) -> tuple[SimilarNames, ...]:
    """The pairs, surest first."""
    return tuple(sorted(pairs, key=lambda pair: (_ORDER.index(pair.kind), -pair.strength)))


def _pair(
    one: str, two: str, owners: Mapping[str, Sequence[str]], kind: Kind, why: str, strength: float = 1.0
) -> SimilarNames:
    datasets = (tuple(owners[one]), tuple(owners[two]))
    return SimilarNames(names=(one, two), owners=datasets, kind=kind, why=why, strength=strength)


def _together(one: str, two: str, owners: Mapping[str, Sequence[str]]) -> bool:
    """Whether one dataset annotates both names: then they mean different things there."""
    return not set(owners[one]).isdisjoint(owners[two])


def _meant(one: str, two: str, strength: float) -> str:
    kind = next((f", perhaps a kind of {b}" for a, b in ((one, two), (two, one)) if has_head(a, b)), "")
    return f"near in meaning, {strength:.2f}{kind}"


def _best(by_spelling: Sequence[SimilarNames], meant: Sequence[SimilarNames]) -> list[SimilarNames]:
    """The pairs similar in meaning, unless a name has a clearly more similar partner in the other's dataset."""
    nearest: defaultdict[tuple[str, str], float] = defaultdict(float)
    for pair in (*by_spelling, *meant):
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
