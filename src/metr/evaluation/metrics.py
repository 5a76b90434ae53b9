"""Metrics beside average precision: recall of presence, and confusion between datasets.

Recall of presence: how well the network knows which categories an image shows, before it looks for their boxes.
Cross-dataset confusion: how often a detector with the joint vocabulary names a category of another domain. A domain is
a kind of image (blood smears, playing cards, ...) and has one or several datasets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from metr.data.records import Annotations
from metr.inference.coco_results import ImageId
from metr.structures import Detections

DEFAULT_KEPT = (1, 5, 10, 20)
NO_DOMAIN = "no domain"


@dataclass(frozen=True, kw_only=True)
class PresenceRecall:
    """Counts that add up over batches: of `pairs` (image, category present in it), `hits[k]` were kept by `k`.

    Kept by `k` means: among the `k` most likely categories of the image.
    """

    pairs: int = 0
    hits: Mapping[int, int] = field(default_factory=dict)

    def __add__(self, other: "PresenceRecall") -> "PresenceRecall":
        """The counts of both."""
        kept = sorted({*self.hits, *other.hits})
        hits = {k: self.hits.get(k, 0) + other.hits.get(k, 0) for k in kept}
        return PresenceRecall(pairs=self.pairs + other.pairs, hits=hits)

    @property
    def shares(self) -> dict[int, float | None]:
        """Recall at each k on the scale 0 to 100; None where nothing was present."""
        return {k: 100 * hits / self.pairs if self.pairs else None for k, hits in self.hits.items()}


def presence_recall(
    logits: Float[Tensor, "b v"], present: Bool[Tensor, "b v"], kept: Sequence[int] = DEFAULT_KEPT
) -> PresenceRecall:
    """Counts which categories that are present stand among the most likely ones.

    Args:
        logits: Presence logits of the last extraction block; of equal ones the earlier row comes first. What is at -inf
            was not shortlisted, and is kept by no number.
        present: Where a category is annotated and has an object.
        kept: The numbers of categories to keep.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)[present]
    possible = ~logits[present].isneginf()
    return PresenceRecall(pairs=rank.numel(), hits={k: int((possible & (rank < k)).sum()) for k in kept})


@dataclass(frozen=True, kw_only=True)
class CrossDatasetConfusion:
    """What the best detections name, by domain.

    `counts[i][j]` is how many detections in images of `domains[i]` name `domains[j]`. A name of several domains counts
    for the image's own where that is one of them, else for each in equal parts. `shares` is the share that names
    another domain, on the scale 0 to 100, for each dataset; `pooled` that of all detections together; None where
    nothing was detected.
    """

    domains: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]
    shares: Mapping[str, float | None]
    pooled: float | None


def count_best_names(annotations: Annotations, detections: Mapping[ImageId, Detections]) -> Counter[str]:
    """How often each name occurs among the n best detections of each image, n being its number of objects.

    So the long tail of weak detections does not count.

    Args:
        annotations: What the images show; crowds are no objects.
        detections: Detections with the joint vocabulary, by image id; images without an entry add nothing.
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
    domains: Mapping[str, str] | None = None,
) -> CrossDatasetConfusion:
    """Sums up which domains the detections in the images of each dataset name.

    Args:
        named: For each dataset, how often each name was detected in its images (`count_best_names`).
        categories: The names of each dataset, those of datasets that were not evaluated included.
        domains: The domain of each dataset; a dataset that is not in it is a domain of its own.
    """
    domain_of = {dataset: (domains or {}).get(dataset, dataset) for dataset in (*named, *categories)}
    owners = _owners(categories, domain_of)
    order = list(dict.fromkeys(domain_of.values()))
    if any(name not in owners for names in named.values() for name in names):
        order.append(NO_DOMAIN)
    row = {domain: number for number, domain in enumerate(order)}
    counts = np.zeros((len(order), len(order)))
    shares: dict[str, float | None] = {}
    for dataset, names in named.items():
        here, own = np.zeros(len(order)), domain_of[dataset]
        for name, number in names.items():
            owning = owners.get(name, (NO_DOMAIN,))
            counted = (own,) if own in owning else owning
            here[[row[domain] for domain in counted]] += number / len(counted)
        counts[row[own]] += here
        shares[dataset] = _share(here.sum() - here[row[own]], here.sum())
    return CrossDatasetConfusion(
        domains=tuple(order),
        counts=tuple(tuple(line) for line in counts.tolist()),
        shares=shares,
        pooled=_share(counts.sum() - counts.trace(), counts.sum()),
    )


def _owners(categories: Mapping[str, Sequence[str]], domain_of: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The domains that have each name."""
    owners: dict[str, dict[str, None]] = {}
    for dataset, names in categories.items():
        for name in names:
            owners.setdefault(name, {})[domain_of[dataset]] = None
    return {name: tuple(domains) for name, domains in owners.items()}


def _share(part: float, whole: float) -> float | None:
    return float(100 * part / whole) if whole else None
