"""The whole look at several datasets: facts, issues, names that are near or doubtful, and the coverage matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.formats.base import IssueLog
from metr.data.records import DataIssue
from metr.errors import DependencyError, ModelError
from metr.inspection.config import InspectionConfig
from metr.inspection.coverage import Coverage, coverage_of
from metr.inspection.detector_hints import Sights, near_by_sight, sights_of
from metr.inspection.duplicates import (
    Overlap,
    Say,
    check_images,
    equal_images,
    note_duplicates,
    overlaps,
    places_of,
)
from metr.inspection.embedding_similarity import EmbeddingSimilarity, joint_vocabulary, meanings_of, owners_of
from metr.inspection.facts import DatasetFacts, facts_of, strays_of
from metr.inspection.homonyms import Homonym, homonyms_of
from metr.inspection.similar_names import SimilarNames, in_order, similar_names
from metr.inspection.suggestions import Suggestion, suggestions_of

if TYPE_CHECKING:
    from metr.model import METR


@dataclass(frozen=True, kw_only=True)
class Issues:
    """What is wrong in one dataset: how many issues of each kind, and the first of each.

    `opened` of `images` image files were opened to find out.
    """

    counts: Mapping[str, int]
    first: tuple[DataIssue, ...]
    opened: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that was found. `facts` and `issues` are of each dataset, the rest is between them.

    `owners` are the datasets that annotate each name. `text` says by which language model names were compared, and
    `text_issue` why not.
    """

    facts: tuple[DatasetFacts, ...]
    issues: Mapping[str, Issues]
    overlaps: tuple[Overlap, ...]
    owners: Mapping[str, tuple[str, ...]]
    near: tuple[SimilarNames, ...]
    homonyms: tuple[Homonym, ...]
    coverage: Coverage
    suggestions: tuple[Suggestion, ...]
    text: str
    text_issue: str | None
    sights: Sights | None


def inspect(
    data: Sequence[str],
    config: InspectionConfig | None = None,
    *,
    model: "METR | None" = None,
    every_image: bool = False,
) -> Inspection:
    """Opens datasets and compares them, as `metr inspect` does. Nothing is changed.

    Args:
        data: Datasets: folders, name=folder, or YAML files that list some.
        config: Thresholds, the language model, how much is looked at.
        model: A detector that looks for the names of all datasets in some images of each.
        every_image: Read every image whole, however many there are, not only the headers of some.

    Raises:
        DataError: a dataset cannot be read.
        ConfigError: a YAML file does not list datasets as it should.
    """
    sources = [open_dataset(spec) for spec in parse_data_arguments(data)]
    return inspect_datasets(sources, config, model=model, every_image=every_image)


def inspect_datasets(
    sources: Sequence[DatasetSource],
    config: InspectionConfig | None = None,
    *,
    model: "METR | None" = None,
    shown_as: str = "the detector",
    every_image: bool = False,
    say: Say | None = None,
) -> Inspection:
    """Looks at datasets and compares them. Nothing is changed.

    Args:
        sources: The opened datasets, each with a name of its own.
        config: Thresholds, the language model, how much is looked at.
        model: A detector that looks for the names of all datasets in some images of each.
        shown_as: How the detector is called in messages.
        every_image: Read every image whole, however many there are, not only the headers of some.
        say: Told what is being done, in a few words.
    """
    config, say = config or InspectionConfig(), say or _silent
    facts = []
    for source in sources:
        say(f"{source.name}: measuring boxes")
        facts.append(facts_of(source, config.annotations))
    logs = [IssueLog() for _ in sources]
    for log, one in zip(logs, facts, strict=True):
        for issue in strays_of(one):
            log.add(issue.kind, issue.where, issue.detail)
    issues, common = _files(sources, logs, config, every_image, say)
    owners = owners_of(sources)
    meanings, text_issue = _meanings(sources, config, say)
    sights = None if model is None else sights_of(model, sources, config, shown_as, say)
    say("comparing names")
    homonyms = homonyms_of(facts, meanings, config.far)
    near = [*similar_names(owners, meanings, config.near), *(near_by_sight(sights, owners) if sights else ())]
    undoubted = in_order([pair for pair in near if not any(homonym.between(*pair.names) for homonym in homonyms)])
    return Inspection(
        facts=tuple(facts),
        issues=issues,
        overlaps=common,
        owners=owners,
        near=undoubted,
        homonyms=homonyms,
        coverage=coverage_of(facts, homonyms, meanings, sights, config.akin),
        suggestions=suggestions_of(facts, undoubted, homonyms),
        text=config.text.source,
        text_issue=text_issue,
        sights=sights,
    )


def _silent(_: str) -> None:
    """Takes what is said, and does nothing."""


def _meanings(
    sources: Sequence[DatasetSource], config: InspectionConfig, say: Say
) -> tuple[EmbeddingSimilarity | None, str | None]:
    """Embeddings of all names, or why there are none."""
    vocabulary = joint_vocabulary(sources)
    say(f"reading {len(vocabulary):,} names")
    try:
        return meanings_of(vocabulary, config.text), None
    except (DependencyError, ModelError) as error:
        return None, str(error)


def _files(
    sources: Sequence[DatasetSource],
    logs: Sequence[IssueLog],
    config: InspectionConfig,
    every_image: bool,
    say: Say,
) -> tuple[dict[str, Issues], tuple[Overlap, ...]]:
    """The issues of each dataset, those of its image files among them, and what datasets have in common.

    Images are compared where all of a dataset's are opened; file names always.
    """
    places = [places_of(source) for source in sources]
    opened = []
    for source, log in zip(sources, logs, strict=True):
        say(f"{source.name}: opening images")
        opened.append(check_images(source, None if every_image else config.files, log, say))
    say("comparing images")
    compared = [mine for mine, count in zip(places, opened, strict=True) if count == len(mine)]
    equal = equal_images(place for mine in compared for place in mine)
    issues = {}
    for source, mine, log, count in zip(sources, places, logs, opened, strict=True):
        note_duplicates(mine, equal, log)
        counts = dict(source.issue_counts)
        for kind, number in log.counts.items():
            counts[kind] = counts.get(kind, 0) + number
        first = (*source.issues, *log.kept)
        issues[source.name] = Issues(counts=counts, first=first, opened=count, images=len(mine))
    return issues, overlaps(equal)
