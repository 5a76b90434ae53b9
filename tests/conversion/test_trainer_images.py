"""Datasets for transformers' Trainer: labels by name and by alias, batches that hold what the dataset tells, scores."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conversion_cases import SIDE, alike, stirred
from PIL import Image
from rich.console import Console
from transformers import ResNetConfig

from metr.checkpoint import DetectionDefaults
from metr.conversion.export import colours_of
from metr.conversion.targets import find_target
from metr.conversion.trainer import _detected, how_to_go_on, keep_aliases, trainer_batch, trainer_images, trainer_result
from metr.conversion.transfer import transfer
from metr.data.config import ResizeConfig
from metr.data.joint import open_joint
from metr.data.records import ImageRecord
from metr.errors import DataError
from metr.model import METR
from metr.models.backbones.registered import EfficientNetLiteConfig

from tiny import TinyRun


def labelled(*names: str, **more: Any) -> SimpleNamespace:
    """A detector of transformers as far as its labels are asked for."""
    rows = dict(enumerate(names))
    return SimpleNamespace(config=SimpleNamespace(id2label=rows, label2id={n: row for row, n in rows.items()}, **more))


def with_renames(file: Path, data: str, renames: dict[str, str]) -> str:
    """A datasets file with one dataset, whose names are changed."""
    file.write_text(f"datasets:\n  - {{name: renamed, path: {data}, renames: {renames}}}\n", encoding="utf-8")
    return str(file)


@pytest.fixture
def transferred(tiny_run: TinyRun, tmp_path: Path) -> Callable[[DetectionDefaults], Any]:
    """Transfers the run, with other defaults of detection, and loads the detector from its folder."""

    def go(detection: DetectionDefaults) -> Any:
        from transformers import AutoModelForObjectDetection

        own = METR.from_pretrained(tiny_run.folder, device="cpu")
        transfer(METR(own.network, replace(own.checkpoint, detection=detection)), "rt_detr", tmp_path / "detector")
        return AutoModelForObjectDetection.from_pretrained(tmp_path / "detector")

    return go


def test_labels_are_those_that_the_detector_has_by_name(tiny_run: TinyRun) -> None:
    data, (source,) = tiny_run.data[0], open_joint(tiny_run.data[:1]).sources
    names = list(reversed(source.categories))
    model, before = labelled("zebra", *names), source.split("train")
    for row, record in enumerate(trainer_images(data, model)):
        assert record.path == before[row].path
        expected = [1 + names.index(source.categories[label]) for label in before[row].labels.tolist()]
        assert record.labels.tolist() == expected


def test_a_name_that_is_no_label_ends_in_the_command_that_gives_it(tiny_run: TinyRun) -> None:
    data, (source,) = tiny_run.data[0], open_joint(tiny_run.data[:1]).sources
    lost, *names = source.categories
    with pytest.raises(DataError, match=f"the detector has no label for {lost}; it has zebra") as raised:
        trainer_images(data, labelled("zebra", *names, model_type="d_fine"))
    assert f"metr transfer RUN --to d_fine -o OUT --names {data}" in str(raised.value)


def test_names_that_finetuning_took_as_trained_ones_are_found(
    transferred: Callable[[DetectionDefaults], Any], tiny_run: TinyRun, tmp_path: Path
) -> None:
    """`--same-names yes`: the detector's label is the trained name, the dataset has its own."""
    first, *others = open_joint(tiny_run.data[:1]).sources[0].categories
    model = transferred(DetectionDefaults(names=(first, *others), aliases={first.upper(): first}))
    assert tuple(model.config.id2label.values()) == (first, *others)
    data = with_renames(tmp_path / "data.yaml", tiny_run.data[0], {first: first.upper()})
    found, expected = trainer_images(data, model), trainer_images(tiny_run.data[0], model)
    assert [one.labels.tolist() for one in found] == [one.labels.tolist() for one in expected]
    # also after transformers has trained and saved it
    model.save_pretrained(tmp_path / "trained")
    again = type(model).from_pretrained(tmp_path / "trained")
    assert [one.labels.tolist() for one in trainer_images(data, again)] == [one.labels.tolist() for one in expected]


def test_a_dataset_that_tells_both_names_apart_keeps_them_apart(tiny_run: TinyRun, tmp_path: Path) -> None:
    first, second, *others = open_joint(tiny_run.data[:1]).sources[0].categories
    model = labelled(first, *others)
    keep_aliases(model, {second: first, "else": "no label"})
    with pytest.raises(DataError, match=f"no label for {second}"):
        trainer_images(tiny_run.data[0], model)
    keep_aliases(bare := labelled(first, second), {second: first})
    assert vars(bare.config).keys() == {"id2label", "label2id"}, "a label is not another's alias"


def test_several_datasets_are_trained_on_together(tiny_run: TinyRun, tmp_path: Path) -> None:
    joint = open_joint(tiny_run.data[:2])
    both = tmp_path / "both.yaml"
    both.write_text(f"datasets:\n  - {tiny_run.data[0]}\n  - {tiny_run.data[1]}\n", encoding="utf-8")
    model = labelled(*joint.vocabulary.names)
    assert len(trainer_images(both, model)) == sum(len(one.split("train")) for one in joint.sources)
    with pytest.raises(DataError, match="expected one dataset, found 2"):
        trainer_result(both, model, None)


def records_in(folder: Path) -> list[ImageRecord]:
    """Two images of two shapes, with a crowd, which is not taught, and one without objects."""
    records = []
    for number, (width, height) in enumerate(((64, 128), (80, 40))):
        path = folder / f"{number}.png"
        Image.new("RGB", (width, height), (200, 10, 90)).save(path)
        boxes = np.array([[8, 16, 40, 80], [0, 0, 64, 128]], dtype=np.float32)[: 2 * (1 - number)]
        record = ImageRecord(
            image_id=number,
            path=path,
            width=width,
            height=height,
            boxes=boxes,
            labels=np.array([2, 1])[: len(boxes)],
            areas=np.array([2048.0, 8192.0], dtype=np.float32)[: len(boxes)],
            ignore=np.array([False, True])[: len(boxes)],
        )
        records.append(record)
    return records


@pytest.fixture
def processor() -> Any:
    """An image processor that keeps the shape of images."""
    target = find_target("deformable_detr")
    return target.image_processor(ResizeConfig(mode="fit", size=SIDE), colours_of(stirred(alike(target.name))))


def test_a_batch_for_a_trainer(tmp_path: Path, processor: Any) -> None:
    batch = trainer_batch(processor, records_in(tmp_path))
    assert batch["pixel_values"].shape[:2] == (2, 3)
    first, second = batch["labels"]
    assert first["class_labels"].tolist() == [2]
    assert len(second["class_labels"]) == 0
    # cxcywh, as shares of the image with its padding
    height, width = batch["pixel_values"].shape[2:]
    share = torch.tensor([64 / width, 128 / height]).repeat(2)
    torch.testing.assert_close(first["boxes"], torch.tensor([[24 / 64, 48 / 128, 32 / 64, 64 / 128]]) * share)


def test_boxes_follow_an_image_that_is_turned_or_of_another_size(tmp_path: Path, processor: Any) -> None:
    """As METR's own training does: boxes are meant in an image of the size that the annotations declare."""
    upright = records_in(tmp_path)[0]
    exif = Image.Exif()
    exif[274] = 6  # the pixels are stored lying on their left side
    Image.new("RGB", (128, 64)).save(tmp_path / "turned.jpg", exif=exif)
    lying = np.array([[16, 24, 80, 56], [0, 0, 128, 64]], dtype=np.float32)
    turned = replace(upright, path=tmp_path / "turned.jpg", width=128, height=64, boxes=lying)
    Image.new("RGB", (128, 256)).save(tmp_path / "large.png")
    expected = trainer_batch(processor, [upright])["labels"][0]["boxes"]
    for record in (turned, replace(upright, path=tmp_path / "large.png")):
        torch.testing.assert_close(trainer_batch(processor, [record])["labels"][0]["boxes"], expected)


@pytest.mark.parametrize("target", ["rt_detr", "deformable_detr", "detr"])
def test_a_detector_that_finds_everything_scores_100(target: str, tiny_run: TinyRun) -> None:
    """Labels in another order than the dataset's, images of several sizes, the processor's own post-processing."""
    data, (source,) = tiny_run.data[0], open_joint(tiny_run.data[:1]).sources
    split = source.split("val")
    names = ("zebra", *reversed(source.categories))
    processor = find_target(target).image_processor(ResizeConfig(size=64), ((0.5,) * 3, (0.5,) * 3))
    by_image = {
        processor([Image.open(one.path).convert("RGB")], return_tensors="pt")["pixel_values"].numpy().tobytes(): one
        for one in (split[row] for row in range(len(split)))
    }
    assert len(by_image) == len(split), "images are told apart by their pixels"

    class Oracle:
        """Knows each image, and where its objects are."""

        config, device = labelled(*names).config, torch.device("cpu")

        def eval(self) -> None:
            """It has one mode."""

        def __call__(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> Any:
            logits = torch.full((len(pixel_values), 120, len(names) + (target == "detr")), -30.0)
            logits[..., -1] = 30.0 if target == "detr" else -30.0  # no object
            boxes = torch.full((len(pixel_values), 120, 4), 0.5)
            for row, pixels in enumerate(pixel_values):
                known = by_image[pixels[None].numpy().tobytes()]
                scale = np.array([known.width, known.height] * 2)
                corners = torch.from_numpy(known.boxes / scale)
                count = len(corners)
                boxes[row, :count] = torch.cat(
                    [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1
                )
                for query, label in enumerate(known.labels.tolist()):
                    logits[row, query] = -30.0
                    logits[row, query, names.index(source.categories[label])] = 30.0
            return SimpleNamespace(logits=logits, pred_boxes=boxes)

    result = trainer_result(data, Oracle(), processor)
    assert result.ap == pytest.approx(100)
    assert result.images == len(split)


@pytest.mark.parametrize("clipped", [True, False])
def test_boxes_beyond_the_edge_are_clipped_if_asked(clipped: bool, tiny_run: TinyRun) -> None:
    """Transformers leaves them as they are."""
    (record, *_) = iter(trainer_images(tiny_run.data[0], labelled(*open_joint(tiny_run.data[:1]).vocabulary.names)))
    processor = find_target("rt_detr").image_processor(ResizeConfig(size=64), ((0.5,) * 3, (0.5,) * 3))
    output = SimpleNamespace(logits=torch.tensor([[[3.0]]]), pred_boxes=torch.tensor([[[0.5, 0.0, 0.5, 2.0]]]))

    class Model:
        config, device = labelled("all").config, torch.device("cpu")

        def __call__(self, **_: Any) -> Any:
            return output

    (found,) = _detected(Model(), processor, [record], clipped=clipped)
    width, height = record.width, record.height
    expected = [0.25 * width, 0.0 if clipped else -height, 0.75 * width, height]
    assert found.boxes[0].tolist() == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # Trainer's default, also without a GPU
def test_the_lines_that_a_transfer_prints_run(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = StringIO()
    console = Console(file=said, width=10_000)
    transfer(tiny_run.folder, "rt_detr", tmp_path / "detector", names=tiny_run.data[0], steps=2, console=console)
    _, lines = said.getvalue().split("go on with transformers' Trainer")
    assert "metr.register()" not in lines, "its backbone is transformers' own"
    code = [line.removeprefix("  ") for line in lines.splitlines()[1:]]
    assert all(line == line.lstrip() for line in code)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code).replace("DATA", tiny_run.data[0]).replace("max_steps=500", "max_steps=1"), {})
    assert "AP on val: " in capsys.readouterr().out
    assert {"config.json", "preprocessor_config.json"} <= {
        path.name for path in (tmp_path / "detector-trained").iterdir()
    }


@pytest.mark.parametrize(("backbone", "needed"), [(EfficientNetLiteConfig(), True), (ResNetConfig(), False)])
def test_only_metrs_own_backbone_has_to_be_registered(backbone: Any, needed: bool) -> None:
    model = SimpleNamespace(config=SimpleNamespace(backbone_config=backbone))
    assert ("metr.register()" in how_to_go_on(model, Path("out"))) is needed
