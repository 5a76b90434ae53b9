"""The label report: facts and issues of each dataset, similar names and homonyms between them, and coverage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.formats.base import IssueLog
from metr.data.guard import faults_of
from metr.data.records import DataIssue
from metr.errors import DependencyError, ModelError, counted
from metr.inspection import InspectionConfig
from metr.inspection.coverage import Coverage, Homonym, coverage_of, homonyms_of
from metr.inspection.datasets_file import Suggestion, suggestions_of
from metr.inspection.detector_hints import DetectorHints, detector_hints_of, similar_by_detector
from metr.inspection.duplicates import (
    Overlap,
    Progress,
    check_images,
    equal_images,
    note_duplicates,
    overlaps,
    places_of,
)
from metr.inspection.facts import DatasetFacts, facts_of, strays_of, without_boxes
from metr.inspection.languages import ForeignNames, foreign_names
from metr.inspection.similar_names import SimilarNames, in_order, joint_vocabulary, owners_of, similar_names
from metr.text.config import BUNDLED
from metr.text.similar_names import EmbeddingSimilarity, embed_names

if TYPE_CHECKING:
    from metr.model import METR

# Pairs of images with equal file names that are looked at in each dataset, unless all are asked for.
_NAMED_ALIKE = 500


@dataclass(frozen=True, kw_only=True)
class Issues:
    """The issues of one dataset: how many of each kind, and the first of each.

    `opened` of `images` image files were opened.
    """

    counts: Mapping[str, int]
    first: tuple[DataIssue, ...]
    opened: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of an inspection: `facts` and `issues` for each dataset, the rest across datasets.

    `owners` are the datasets that annotate each name. `foreign` are names without a prompt that the bundled language
    model does not read; there are none with another model. `text` is the language model that compared names, and
    `text_issue` says why names of several datasets were not compared by meaning.
    """

    facts: tuple[DatasetFacts, ...]
    issues: Mapping[str, Issues]
    overlaps: tuple[Overlap, ...]
    owners: Mapping[str, tuple[str, ...]]
    similar: tuple[SimilarNames, ...]
    homonyms: tuple[Homonym, ...]
    foreign: tuple[ForeignNames, ...]
    coverage: Coverage
    suggestions: tuple[Suggestion, ...]
    text: str
    text_issue: str | None
    detector_hints: DetectorHints | None


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
    detector_name: str = "the detector",
    every_image: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Inspects datasets and compares their labels. Changes nothing.

    Args:
        sources: The opened datasets, each with a name of its own.
        config: Thresholds, the language model, and how many images are inspected.
        model: A detector that looks for the names of all datasets in some images of each.
        detector_name: The name of the detector in messages.
        every_image: Decode every image, instead of reading the headers of some.
        progress: Called with a short description of each stage.
    """
    config, progress = config or InspectionConfig(), progress or _silent
    facts = []
    for source in sources:
        progress(f"{source.name}: measuring boxes")
        facts.append(facts_of(source, config.annotations))
    logs = [IssueLog() for _ in sources]
    for log, one, source in zip(logs, facts, sources, strict=True):
        faults = (
            fault for split in dict.fromkeys([*source.splits, *source.dropped]) for fault in faults_of(source, split)
        )
        for issue in (*faults, *without_boxes(one), *strays_of(one)):
            log.add(issue.kind, issue.where, issue.detail)
    issues, common = _files(sources, logs, config, every_image, progress)
    owners = owners_of(sources)
    embeddings, text_issue = _embeddings(sources, config, progress)
    detector_hints = None if model is None else detector_hints_of(model, sources, config, detector_name, progress)
    progress("comparing names")
    homonyms = homonyms_of(facts, embeddings, config.unrelated)
    near = [
        *similar_names(owners, embeddings, config.similar),
        *(similar_by_detector(detector_hints, owners) if detector_hints else ()),
    ]
    foreign = _foreign(sources, config)
    unambiguous = in_order([pair for pair in near if not any(homonym.between(*pair.names) for homonym in homonyms)])
    return Inspection(
        facts=tuple(facts),
        issues=issues,
        overlaps=common,
        owners=owners,
        similar=unambiguous,
        homonyms=homonyms,
        foreign=foreign,
        coverage=coverage_of(facts, unambiguous, homonyms, detector_hints),
        suggestions=suggestions_of(facts, unambiguous, homonyms, foreign),
        text=config.text.source,
        text_issue=text_issue,
        detector_hints=detector_hints,
    )


def _silent(_: str) -> None:
    """Ignores reports of progress."""


def _foreign(sources: Sequence[DatasetSource], config: InspectionConfig) -> tuple[ForeignNames, ...]:
    """The names without a prompt that the bundled language model does not read."""
    if config.text.source != BUNDLED:
        return ()
    named = ((one.name, [name for name in one.categories if name not in one.config.prompts]) for one in sources)
    return tuple(found for name, names in named if (found := foreign_names(name, names)))


def _embeddings(
    sources: Sequence[DatasetSource], config: InspectionConfig, progress: Progress
) -> tuple[EmbeddingSimilarity | None, str | None]:
    """Embeddings of all names, or why there are none.

    A single dataset tells its names apart, so they are not compared by meaning, and nothing is said.
    """
    if len(sources) < 2:
        return None, None
    vocabulary = joint_vocabulary(sources)
    if len(vocabulary) > config.names:
        more = f"--set names={len(vocabulary)} compares all by meaning, which may take minutes"
        return None, f"{len(vocabulary):,} names are more than {config.names:,} ({more})"
    progress(f"reading {counted(len(vocabulary), 'name')}")
    try:
        return embed_names(vocabulary, config.text), None
    except (DependencyError, ModelError) as error:
        return None, str(error)


def _files(
    sources: Sequence[DatasetSource],
    logs: Sequence[IssueLog],
    config: InspectionConfig,
    every_image: bool,
    progress: Progress,
) -> tuple[dict[str, Issues], tuple[Overlap, ...]]:
    """The issues of each dataset, image files included, and the images that datasets have in common.

    Bytes are compared only for datasets whose images were all opened; images with equal file names always.
    """
    places = [places_of(source) for source in sources]
    opened = []
    for source, log in zip(sources, logs, strict=True):
        progress(f"{source.name}: opening images")
        opened.append(check_images(source, None if every_image else config.files, log, progress))
    progress("comparing images")
    compared = [mine for mine, count in zip(places, opened, strict=True) if count == len(mine)]
    equal = equal_images(place for mine in compared for place in mine)
    issues = {}
    for source, mine, log, count in zip(sources, places, logs, opened, strict=True):
        note_duplicates(mine, equal, log, None if every_image else _NAMED_ALIKE)
        counts = dict(source.issue_counts)
        for kind, number in log.counts.items():
            counts[kind] = counts.get(kind, 0) + number
        first = (*source.issues, *log.kept)
        issues[source.name] = Issues(counts=counts, first=first, opened=count, images=len(mine))
    return issues, overlaps(equal)
