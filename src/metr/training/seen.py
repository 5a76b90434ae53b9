"""What is known of a run's val images when it begins with a detector that was trained on them."""

from collections.abc import Iterable

from metr.data.datasets_file import DatasetSource
from metr.data.records import TEST, VAL
from metr.evaluation.seen import MEANING, Seen, known_seen
from metr.fitting import Hanging
from metr.model import METR


def seen_before(model: METR, sources: Iterable[DatasetSource]) -> list[Seen]:
    """What is known of images that the detector was trained on and that a run evaluates on."""
    given = tuple(sources)
    splits = {one.name: VAL if VAL in one.splits else TEST for one in given}
    return known_seen(model.checkpoint.training, given, splits, model.vocabulary)


def seen_notes(model: METR, sources: Iterable[DatasetSource]) -> list[Hanging]:
    """Warnings of numbers on images that the detector was trained on."""
    notes = []
    for one in seen_before(model, sources):
        tried = "evaluate on images that it has not seen"
        if one.untouched:
            tried = "a datasets file with splits: {train: train, val: test}, or metr evaluate --split test afterwards"
        notes.append(Hanging(f"warning: {one.dataset}: {one.fact}: {MEANING}. What to try: {tried}"))
    return notes
