"""Two processes share the images of an evaluation: every number is that of one process."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from played import Answer, Images, ScriptedNetwork, annotations, record

from metr.data.config import LoaderConfig, ResizeConfig
from metr.data.records import InMemoryAnnotations
from metr.evaluation.answers import Observation
from metr.evaluation.evaluator import EvaluationSet, Evaluator
from metr.evaluation.results import EvaluationConfig, EvaluationReport, as_dict
from metr.evaluation.runner import EvaluationRunner, diagnosed
from metr.processes import in_main_process, process_count, process_index
from metr.text.vocabulary import Vocabulary
from small_runs import NAMES as SMALL
from small_runs import make_description
from two_processes import launched

from small import small_detector

SCRIPT = """
import json, os, sys
from pathlib import Path
from metr.errors import DataError, MetrError
from metr.evaluation.results import as_dict
from metr.process_group import joined_device
from metr.processes import process_index
import test_several_processes as here

joined_device("cpu")
folder, told = Path(sys.argv[1]), []
reports = [*here.scripted(lambda *step: told.append(step)), *here.real(folder)]
values = {"reports": [as_dict(one) for one in reports], "told": told}
(folder / f"{process_index()}.json").write_text(json.dumps(values))
try:
    getattr(here, sys.argv[2])()
except DataError as error:
    assert process_index() == 0 and sys.argv[3] in str(error), error
    os._exit(0)
except MetrError as error:
    assert process_index() == 1 and "another process" in str(error), error
"""
CAT, DOG = (10.0, 10.0, 40.0, 40.0), (50.0, 20.0, 90.0, 70.0)
OFF = (14.0, 12.0, 42.0, 40.0)
NAMES = ("cat", "dog", "king", "ace")
VOCABULARY = Vocabulary.union({"pets": NAMES[:2], "cards": NAMES[2:], "one": NAMES[:1]})
"""Seven images of pets, two of cards, and one."""
PETS = annotations("pets", NAMES[:2], *(record(f"pet {n}", [(0, CAT), (1, DOG)][: 1 + n % 2]) for n in range(7)))
CARDS = annotations("cards", NAMES[2:], record(0, [(0, CAT)]), record(1, [(1, DOG)]))
ONE = annotations("one", NAMES[:1], record("alone", [(0, CAT)]))
SMALL_BOXES = (
    (49, 34, 56, 38),
    (42, 33, 50, 38),
    (6, 19, 21, 27),
    (21, 18, 36, 27),
    (42, 10, 50, 14),
    (48, 10, 56, 14),
)
SCRIPTED = {
    number: [
        Answer("cat", 0.9 - number / 20, OFF if number % 3 else CAT),
        Answer("dog", 0.2 + number / 15, DOG),
        Answer("king", 0.5 + number / 40, CAT),
    ]
    for number in range(10)
}


class Share(Images):
    """The batches of this process: every image is one process's, by its number."""

    def __init__(self, held: InMemoryAnnotations, numbers: Sequence[int], lost: Sequence[int] = ()) -> None:
        others = [index for index in range(len(held)) if index % process_count() != process_index()]
        super().__init__(held, numbers, skip=(*others, *lost))


def scripted(progress: Any = None) -> Iterator[EvaluationReport]:
    """Reports on all three datasets, on a dataset with an image that cannot be read, and on a single image.

    They have the diagnosis, for which the main process has the answers of all.
    """
    whole = [(PETS, Share(PETS, range(7))), (CARDS, Share(CARDS, (7, 8))), (ONE, Share(ONE, (9,)))]
    for some in (whole, [(PETS, Share(PETS, range(7), lost=(1, 2)))], whole[2:]):
        sets = [EvaluationSet(annotations=held, batches=batches) for held, batches in some]
        seen: list[Observation] = []
        evaluator = Evaluator(torch.eye(4), VOCABULARY, progress=progress, observe=seen.append)
        report = evaluator.evaluate(ScriptedNetwork(NAMES, SCRIPTED), sets)
        assert len(seen) == (len(sets) if in_main_process() else 0)
        for one in seen:
            assert one.presence.keys() == one.detections.keys()
            for image_id, chances in one.presence.items():
                found = {one.detections[image_id].labels[row].item() for row in range(len(one.detections[image_id]))}
                assert {column for column, chance in enumerate(chances.tolist()) if chance > 0.01} == found
        yield diagnosed(report, seen).report


def real(folder: Path) -> Iterator[EvaluationReport]:
    """Reports of a detector on images of several shapes, one of them unreadable, at once on two datasets and on one."""
    cells = images(folder, "cells", 8, broken=3)
    fish = images(folder, "fish", 1)
    description = make_description()
    network, text = small_detector(description.model), description.text_embeddings
    for sets in ([cells, fish], [fish]):
        for resize in (ResizeConfig(size=32, mode="fit"), ResizeConfig(size=32)):
            runner = EvaluationRunner(
                description.vocabulary,
                text,
                {one.name: one for one in sets},
                resize,
                LoaderConfig(batch_size=3, workers=0),
                EvaluationConfig(recall_at=(1, 2)),
            )
            yield runner.report(network)


def nothing_readable() -> None:
    sets = [EvaluationSet(annotations=PETS, batches=Share(PETS, range(7), lost=range(7)))]
    Evaluator(torch.eye(4), VOCABULARY).evaluate(ScriptedNetwork(NAMES, SCRIPTED), sets)


def given_twice() -> None:
    sets = [EvaluationSet(annotations=PETS, batches=Images(PETS, range(7)))]
    Evaluator(torch.eye(4), VOCABULARY).evaluate(ScriptedNetwork(NAMES, SCRIPTED), sets)


def images(folder: Path, name: str, count: int, broken: int = -1) -> InMemoryAnnotations:
    """Images of noise on disk, with objects where the untrained detector has boxes."""
    rng = np.random.default_rng(count)
    (folder / name).mkdir(exist_ok=True)
    records = []
    for number in range(count):
        height, width = ((48, 64), (64, 48), (40, 90))[number % 3]
        path = folder / name / f"{number}.png"
        if not path.exists():
            cv2.imwrite(str(path), rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            if number == broken:
                path.write_bytes(path.read_bytes()[:100])
        x, y = width / 64, height / 48
        boxes = [(label, (x * box[0], y * box[1], x * box[2], y * box[3])) for box in SMALL_BOXES for label in (0, 1)]
        records.append(replace(record(number, boxes), path=path, height=height, width=width))
    return annotations(name, SMALL[name], *records)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "said"),
    [("nothing_readable", "no image could be read"), ("given_twice", "two processes have evaluated")],
)
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, mistake: str, said: str) -> None:
    told: list[tuple[str, int, int]] = []
    expected = [as_dict(one) for one in (*scripted(lambda *step: told.append(step)), *real(tmp_path))]
    launched(SCRIPT, tmp_path, mistake, said)
    for rank in range(2):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        assert got["reports"][:3] == json.loads(json.dumps(expected[:3])), "to the bit"
        assert list(flat(got["reports"])) == pytest.approx(list(flat(expected)), abs=1e-6)
        for name, done, whole in got["told"]:
            assert 0 < done <= whole == {"pets": 7, "cards": 2, "one": 1}[name], "of all processes together"
    assert [one["datasets"][0]["missing"] for one in expected] == [0, 2, 0, 1, 1, 0, 0]
    assert expected[0]["mean"]["own"]["ap"] > 10
    assert expected[0]["mean"]["confusion"] > 10
    assert all(one["mean"]["own"]["ar100"] > 1 for one in expected[3:])


def flat(value: Any) -> Iterator[Any]:
    """All plain values of a report, in order."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from flat(item)
    else:
        yield -1.0 if value is None else value
