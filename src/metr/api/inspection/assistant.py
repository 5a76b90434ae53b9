"""The whole look at several datasets: facts, faults, names that are near or doubtful, and the coverage matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metr.api.inspection.config import InspectionConfig
from metr.api.inspection.coverage import Coverage, coverage_of
from metr.api.inspection.doubts import Doubt, doubts_of
from metr.api.inspection.facts import DatasetFacts, facts_of, strays_of
from metr.api.inspection.meanings import Meanings, joint_vocabulary, meanings_of, owners_of
from metr.api.inspection.near import NearNames, in_order, near_names
from metr.api.inspection.pictures import (
    Overlap,
    Say,
    check_pictures,
    equal_pictures,
    note_duplicates,
    overlaps,
    places_of,
)
from metr.api.inspection.sight import Sights, near_by_sight, sights_of
from metr.api.inspection.suggestions import Suggestion, suggestions_of
from metr.data.readers.base import FaultLog
from metr.data.records import Fault
from metr.data.sources import DetectionSource
from metr.errors import DependencyError, ModelError

if TYPE_CHECKING:
    from metr.api.model import METR


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong in one dataset: how many faults of each kind, and the first of each.

    `opened` of `pictures` picture files were opened to find out.
    """

    counts: Mapping[str, int]
    first: tuple[Fault, ...]
    opened: int
    pictures: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that was found. `facts` and `faults` are of each dataset, the rest is between them.

    `owners` are the datasets that annotate each name. `text` says by which language model names were compared, and
    `text_fault` why not.
    """

    facts: tuple[DatasetFacts, ...]
    faults: Mapping[str, Faults]
    overlaps: tuple[Overlap, ...]
    owners: Mapping[str, tuple[str, ...]]
    near: tuple[NearNames, ...]
    doubts: tuple[Doubt, ...]
    coverage: Coverage
    suggestions: tuple[Suggestion, ...]
    text: str
    text_fault: str | None
    sights: Sights | None


def inspect_datasets(
    sources: Sequence[DetectionSource],
    config: InspectionConfig | None = None,
    *,
    model: "METR | None" = None,
    shown_as: str = "the detector",
    every_picture: bool = False,
    say: Say | None = None,
) -> Inspection:
    """Looks at datasets and compares them. Nothing is changed.

    Args:
        sources: The opened datasets, each with a name of its own.
        config: Thresholds, the language model, how much is looked at.
        model: A detector that looks for the names of all datasets in some pictures of each.
        shown_as: How the detector is called in messages.
        every_picture: Read every picture whole, however many there are, not only the headers of some.
        say: Told what is being done, in a few words.
    """
    config, say = config or InspectionConfig(), say or _silent
    facts = []
    for source in sources:
        say(f"{source.name}: measuring boxes")
        facts.append(facts_of(source, config.annotations))
    logs = [FaultLog() for _ in sources]
    for log, one in zip(logs, facts, strict=True):
        for fault in strays_of(one):
            log.add(fault.kind, fault.where, fault.detail)
    faults, common = _files(sources, logs, config, every_picture, say)
    owners = owners_of(sources)
    meanings, text_fault = _meanings(sources, config, say)
    sights = None if model is None else sights_of(model, sources, config, shown_as, say)
    say("comparing names")
    doubts = doubts_of(facts, meanings, config.far)
    near = [*near_names(owners, meanings, config.near), *(near_by_sight(sights, owners) if sights else ())]
    undoubted = in_order([pair for pair in near if not any(doubt.between(*pair.names) for doubt in doubts)])
    return Inspection(
        facts=tuple(facts),
        faults=faults,
        overlaps=common,
        owners=owners,
        near=undoubted,
        doubts=doubts,
        coverage=coverage_of(facts, doubts, meanings, sights, config.akin),
        suggestions=suggestions_of(facts, undoubted, doubts),
        text=config.text.source,
        text_fault=text_fault,
        sights=sights,
    )


def _silent(_: str) -> None:
    """Takes what is said, and does nothing."""


def _meanings(
    sources: Sequence[DetectionSource], config: InspectionConfig, say: Say
) -> tuple[Meanings | None, str | None]:
    """Embeddings of all names, or why there are none."""
    vocabulary = joint_vocabulary(sources)
    say(f"reading {len(vocabulary):,} names")
    try:
        return meanings_of(vocabulary, config.text), None
    except (DependencyError, ModelError) as error:
        return None, str(error)


def _files(
    sources: Sequence[DetectionSource],
    logs: Sequence[FaultLog],
    config: InspectionConfig,
    every_picture: bool,
    say: Say,
) -> tuple[dict[str, Faults], tuple[Overlap, ...]]:
    """The faults of each dataset, those of its picture files among them, and what datasets have in common.

    Pictures are compared where all of a dataset's are opened; file names always.
    """
    places = [places_of(source) for source in sources]
    opened = []
    for source, log in zip(sources, logs, strict=True):
        say(f"{source.name}: opening pictures")
        opened.append(check_pictures(source, None if every_picture else config.files, log, say))
    say("comparing pictures")
    compared = [mine for mine, count in zip(places, opened, strict=True) if count == len(mine)]
    equal = equal_pictures(place for mine in compared for place in mine)
    faults = {}
    for source, mine, log, count in zip(sources, places, logs, opened, strict=True):
        note_duplicates(mine, equal, log)
        counts = dict(source.fault_counts)
        for kind, number in log.counts.items():
            counts[kind] = counts.get(kind, 0) + number
        first = (*source.faults, *log.kept)
        faults[source.name] = Faults(counts=counts, first=first, opened=count, pictures=len(mine))
    return faults, overlaps(equal)
