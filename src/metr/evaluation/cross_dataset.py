"""Cross-dataset confusion: how often one detector with all names calls an object by a name from another field.

A field is a kind of image (blood smears, playing cards, ...) and has one or several datasets. Of each image as many
of the best detections count as it has objects, so that the long tail of weak ones does not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metr.data.records import Annotations
from metr.evaluation.coco import ImageId
from metr.structures import Detections

NO_FIELD = "no field"


@dataclass(frozen=True, kw_only=True)
class CrossDatasetConfusion:
    """What the best detections name, by field.

    `counts[i][j]` is how many detections in images of `fields[i]` name `fields[j]`. A name of several fields counts
    for the image's own where that is one of them, else for each in equal parts. `shares` is the share that names
    another field, on the scale 0 to 100, for each dataset; `pooled` that of all detections together; None where nothing
    was detected.
    """

    fields: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]
    shares: Mapping[str, float | None]
    pooled: float | None


def count_best_names(annotations: Annotations, detections: Mapping[ImageId, Detections]) -> Counter[str]:
    """How often each name occurs among the n best detections of each image, n being its number of objects.

    Args:
        annotations: What the images show; crowds are no objects.
        detections: Detections with all names, by image id; images without an entry add nothing.
    """
    names: Counter[str] = Counter()
    for index in range(len(annotations)):
        record = annotations[index]
        found = detections.get(record.image_id)
        if found is not None:
            objects = int((~record.ignore).sum())
            best = found.scores.argsort(descending=True, stable=True)[:objects]
            names.update(found.names[label] for label in found.labels[best].tolist())
    return names


def cross_dataset_confusion(
    named: Mapping[str, Mapping[str, int]],
    categories: Mapping[str, Sequence[str]],
    fields: Mapping[str, str] | None = None,
) -> CrossDatasetConfusion:
    """Sums up which fields the detections in the images of each dataset name.

    Args:
        named: For each dataset, how often each name was detected in its images (`count_best_names`).
        categories: The names of each dataset, those included whose images were not looked at.
        fields: The field of each dataset; a dataset that is not in it is a field of its own.
    """
    field_of = {dataset: (fields or {}).get(dataset, dataset) for dataset in (*named, *categories)}
    owners = _owners(categories, field_of)
    order = list(dict.fromkeys(field_of.values()))
    if any(name not in owners for names in named.values() for name in names):
        order.append(NO_FIELD)
    row = {field: number for number, field in enumerate(order)}
    counts = np.zeros((len(order), len(order)))
    shares: dict[str, float | None] = {}
    for dataset, names in named.items():
        here = np.zeros(len(order))
        for name, number in names.items():
            fields_named = owners.get(name, (NO_FIELD,))
            fields_counted = (field_of[dataset],) if field_of[dataset] in fields_named else fields_named
            here[[row[field] for field in fields_counted]] += number / len(fields_counted)
        counts[row[field_of[dataset]]] += here
        shares[dataset] = _share(here.sum() - here[row[field_of[dataset]]], here.sum())
    return CrossDatasetConfusion(
        fields=tuple(order),
        counts=tuple(tuple(line) for line in counts.tolist()),
        shares=shares,
        pooled=_share(counts.sum() - counts.trace(), counts.sum()),
    )


def _owners(categories: Mapping[str, Sequence[str]], field_of: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The fields that have each name."""
    owners: dict[str, dict[str, None]] = {}
    for dataset, names in categories.items():
        for name in names:
            owners.setdefault(name, {})[field_of[dataset]] = None
    return {name: tuple(fields) for name, fields in owners.items()}


def _share(part: float, whole: float) -> float | None:
    return float(100 * part / whole) if whole else None
