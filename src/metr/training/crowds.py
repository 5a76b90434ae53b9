"""Images with more objects of a name than the name has queries, told before training."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from metr.data.joint import JointData
from metr.data.records import Annotations
from metr.errors import counted
from metr.inference.selection import queries_a_name
from metr.models.config import DetectorConfig

# Training images of a dataset that are looked at, and the fraction of their objects without a query that is told.
_LOOKED_AT, _LOST = 200, 0.01


@dataclass(frozen=True, kw_only=True)
class Crowding:
    """The images of a dataset that were looked at: of how many objects too few queries leave how many out.

    `most` is the largest number of objects of one name in an image, and `name` that name.
    """

    images: int
    crowded: int
    objects: int
    left_out: int
    most: int
    name: str


def crowding(annotations: Annotations, queries: int) -> Crowding:
    """What `queries` for each name leave out, in images spread evenly over a split."""
    rows = np.unique(np.linspace(0, len(annotations) - 1, min(len(annotations), _LOOKED_AT)).astype(int)).tolist()
    crowded = objects = left_out = most = 0
    name = ""
    for row in rows:
        record = annotations[row]
        labels, counts = np.unique(record.labels[~record.ignore], return_counts=True)
        if len(counts) == 0:
            continue
        over = int((counts - queries).clip(0).sum())
        crowded, objects, left_out = crowded + (over > 0), objects + int(counts.sum()), left_out + over
        if counts.max() > most:
            most, name = int(counts.max()), annotations.categories[labels[counts.argmax()]]
    return Crowding(images=len(rows), crowded=crowded, objects=objects, left_out=left_out, most=most, name=name)


def crowd_advice(joint: JointData, model: DetectorConfig, *, from_nothing: bool) -> Iterator[str]:
    """A sentence for each dataset whose objects do not have enough queries.

    Args:
        joint: The data.
        model: The network.
        from_nothing: Whether its numbers of queries may be changed; weights that there are have their ceiling.
    """
    for source in joint.sources:
        names = len({*source.categories})
        queries = queries_a_name(names, model)
        found = crowding(joint.train_split(source), queries)
        if found.left_out <= _LOST * found.objects:
            continue
        what = f"{source.name}: a name has {counted(queries, 'query', 'queries')} in an image, which leaves out"
        where = (
            f"{found.left_out:,} of {found.objects:,} objects, in {found.crowded} of {counted(found.images, 'image')}"
        )
        sentence = f"{what} {where} (up to {found.most} of {found.name!r})"
        yield f"{sentence}; {_remedy(names, found.most, model)}" if from_nothing else sentence


def _remedy(names: int, most: int, model: DetectorConfig) -> str:
    """The settings with which so many objects of a name have queries."""
    queries = model.queries
    together = min(model.categories.kept, names) if queries.layout == "uniform" and queries.varied is None else 1
    settings = {"number": (queries.number, together * most), "ceiling": (queries.ceiling, most)}
    wanted = [f"--set model.queries.{name}={needed}" for name, (now, needed) in settings.items() if needed > now]
    return " ".join(wanted)
