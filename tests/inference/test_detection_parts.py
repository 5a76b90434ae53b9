"""A folder of detections in parts: begun, gone on with, refused; and the journal of attempts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from metr.errors import MetrError
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.inference.detection_parts import FAILED, IMAGES, RUN, SCHEMA, PartsFolder, Row, answers_rest_on, taken
from metr.model import METR
from metr.structures import Detections

from tiny import TinyRun

RESTS_ON = {"detector": "0123", "names": ["fish"], "inference": {"precision": "fp32"}}


def found(number: int) -> Detections:
    return Detections(
        boxes=torch.arange(4.0 * number).reshape(-1, 4) / 3,
        scores=torch.linspace(0.9, 0.1, number),
        labels=torch.arange(number) % 2,
        names=("fish", "étoile"),
    )


def begun(path: Path, images: int = 5, part_size: int | None = 2, **changes: Any) -> PartsFolder:
    with taken(path):
        return PartsFolder.open(path, [f"{n}.jpg" for n in range(images)], {**RESTS_ON, **changes}, part_size)


def rows(folder: PartsFolder, part: int) -> list[Row]:
    return [Row(image=image, size=(4, 6), detections=found(1)) for image in folder.images_of(part)]


def test_parts_hold_the_images_in_their_order(tmp_path: Path) -> None:
    folder = begun(tmp_path / "made/out")
    assert (folder.parts, [folder.length(part) for part in range(3)]) == (3, [2, 2, 1])
    assert [folder.images_of(part) for part in range(3)] == [["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"], ["4.jpg"]]
    assert parquet.ParquetFile(folder.path / IMAGES).num_row_groups == 3


@pytest.mark.parametrize(
    ("images", "size", "parts"), [(3, 16, 1), (1600, 25, 64), (64_000, 1000, 64), (70_001, 1000, 71)]
)
def test_few_images_make_small_parts_and_many_make_many(tmp_path: Path, images: int, size: int, parts: int) -> None:
    folder = begun(tmp_path, images, None)
    assert (folder.part_size, folder.parts) == (size, parts)


def test_a_part_has_a_row_an_image_whatever_became_of_it(tmp_path: Path) -> None:
    folder = begun(tmp_path, 3, 4)
    assert not folder.is_complete(0)
    folder.write(0, [Row(image="0.jpg", size=(4, 6), detections=found(3))] * 3)
    content = [
        Row(image="0.jpg", size=(4, 6), detections=found(3)),
        Row(image="caf\udce9.jpg", error="an empty file (0 bytes), not an image"),
        Row(image="2.jpg", size=(480, 640), detections=found(0)),
    ]
    folder.write(0, content)
    assert folder.is_complete(0)
    table = parquet.read_table(folder.file(0))
    assert table.schema.equals(SCHEMA)
    first, second, third = table.to_pylist()
    assert (first["image"], first["width"], first["height"], first["error"]) == ("0.jpg", 6, 4, None)
    torch.testing.assert_close(torch.tensor(first["boxes"]), found(3).boxes)
    torch.testing.assert_close(torch.tensor(first["scores"]), found(3).scores)
    assert first["categories"] == ["fish", "étoile", "fish"]
    assert second == {
        **dict.fromkeys(("width", "height", "boxes", "scores", "categories")),
        **{"image": "caf\\xe9.jpg", "error": "an empty file (0 bytes), not an image"},
    }
    assert (third["width"], third["boxes"], third["scores"], third["categories"]) == (640, [], [], [])

    number, example = folder.write_failed()
    assert (number, example) == (1, ("caf\\xe9.jpg", "an empty file (0 bytes), not an image"))
    (line,) = (tmp_path / FAILED).read_text().splitlines()
    assert json.loads(line) == {"image": "caf\\xe9.jpg", "error": "an empty file (0 bytes), not an image"}
    assert not list(tmp_path.glob(".*.new.*"))


def test_a_part_that_is_cut_off_or_of_another_length_is_not_complete(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.write(0, rows(folder, 0))
    whole = folder.file(0).read_bytes()
    folder.file(0).write_bytes(whole[:-20])
    assert not folder.is_complete(0)
    folder.write(0, rows(folder, 0)[:1])
    assert not folder.is_complete(0)
    folder.write(0, rows(folder, 0))
    assert folder.is_complete(0)


def test_a_run_is_gone_on_with_and_what_killed_commands_left_is_cleared(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.write(1, rows(folder, 1))
    (tmp_path / ".detections-00000.12.new.parquet").write_bytes(b"half")
    folder.journal(0).begin()
    again = begun(tmp_path, part_size=None)
    assert [again.is_complete(part) for part in range(3)] == [False, True, False]
    assert (again.part_size, again.images) == (2, 5)
    assert again.journal(0).attempts == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".lock", "detections-00001.parquet", IMAGES, RUN),
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": 7}, "other images: 2 new, such as 5.jpg"),
        ({"images": 4}, "other images: 1 gone, such as 4.jpg"),
        ({"part_size": 3}, "parts of 2 images, not of 3"),
        ({"detector": "4567"}, "another detector"),
        ({"names": ["shark"]}, r'another setting of names: \["fish"\], now \["shark"\]'),
        ({"inference": {"precision": "bf16"}}, "another setting of inference"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    begun(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MetrError, match=told) as caught:
        begun(tmp_path, **changes)
    assert "another folder with -o" in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_same_images_in_another_order_are_refused(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    with pytest.raises(MetrError, match="their order differs"), taken(tmp_path):
        PartsFolder.open(tmp_path, ["1.jpg", "0.jpg"], RESTS_ON)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "metr detections in parts"}'])
def test_a_file_that_is_not_of_a_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(MetrError, match=r"run\.json"):
        begun(tmp_path)


def test_detections_without_their_run_are_refused_and_a_beginning_is_begun_again(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (tmp_path / RUN).unlink()  # as it is where a command was killed before it was written
    begun(tmp_path, 6)
    (tmp_path / RUN).unlink()
    folder.write(0, rows(folder, 0))
    with pytest.raises(MetrError, match=r"a run whose run\.json is gone"):
        begun(tmp_path)


def test_a_folder_belongs_to_one_command_at_a_time(tmp_path: Path) -> None:
    with taken(tmp_path), pytest.raises(MetrError, match="another command detects into this folder"), taken(tmp_path):
        pass
    begun(tmp_path)


def test_the_journal_tells_an_image_from_a_killed_process(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.journal(1).begin()  # the fast attempt
    for fatal in (frozenset(), frozenset(), frozenset({1})):
        journal = folder.journal(1)
        assert journal.fatal == fatal
        assert not journal.is_hopeless
        journal.begin()
        journal.at(0)
        journal.at(1)
    assert folder.journal(1).attempts == [None, 1, 1, 1]
    folder.journal(1).close()
    assert folder.journal(1).attempts == []
    for _ in range(5):
        assert not folder.journal(1).is_hopeless
        folder.journal(1).begin()
    assert folder.journal(1).is_hopeless


def test_answers_rest_on_weights_names_and_settings_but_not_on_the_batch(tiny_run: TinyRun) -> None:
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    ours = answers_rest_on(model.predictor(["fish", "leaf"]))
    assert ours == json.loads(json.dumps(ours))
    assert ours == answers_rest_on(model.predictor(["fish", "leaf"], InferenceConfig(batch_size=1)))
    other = InferenceConfig(postprocess=PostprocessConfig(score_threshold=0.2))
    assert ours["inference"] != answers_rest_on(model.predictor(["fish", "leaf"], other))["inference"]
    assert ours["names"] != answers_rest_on(model.predictor(["leaf", "fish"]))["names"]
    with torch.no_grad():
        next(model.network.parameters()).flatten()[0] += 1e-3
    assert ours["detector"] != answers_rest_on(model.predictor(["fish", "leaf"]))["detector"]
