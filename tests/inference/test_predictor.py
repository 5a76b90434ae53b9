from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from metr.data.config import ResizeConfig
from metr.data.images import load_image
from metr.errors import DataError, ModelError
from metr.inference.config import InferenceConfig
from metr.inference.predictor import Predictor
from metr.structures import Categories, Detections, DetectorOutput, Proposals

from small import TEXT_WIDTH, small_config, small_detector

NAMES = ("lamp", "cat")
FIT = ResizeConfig(mode="fit", size=64, longest=96)
STRETCH = ResizeConfig(mode="stretch", size=64)


class FindsLamps(nn.Module):
    """Its one query boxes what is bright, and says "lamp" as surely as that is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor, padding_mask: Tensor, text: Tensor) -> DetectorOutput:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.batches.append(len(images))
        boxes, logits = [], []
        for image, padding in zip(images.mean(1), padding_mask, strict=True):
            assert ((image >= 0) & (image <= 1)).all()
            height, width = (~padding).any(1).sum(), (~padding).any(0).sum()
            rows, columns = ((image > 0.75) & ~padding).nonzero().unbind(1)
            x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
            sides = torch.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height])
            boxes.append(sides)
            logits.append(image[rows, columns].mean())
        count = len(images)
        slot = torch.zeros(count, 1, dtype=torch.int64)
        valid = torch.ones(count, 1, dtype=torch.bool)
        answer = torch.stack(logits).reshape(1, count, 1), torch.stack(boxes).reshape(1, count, 1, 4)
        return DetectorOutput(
            logits=answer[0],
            boxes=answer[1],
            slot=slot,
            valid=valid,
            categories=Categories(
                presence_logits=torch.zeros(1, count, len(text)),
                text=text,
                tokens=text.expand(count, -1, -1),
                ids=slot,
                valid=valid,
            ),
            proposals=Proposals(logits=answer[0][0], boxes=answer[1][0], place=slot, slot=slot, rank=slot, valid=valid),
        )


def lamp_image(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.full((height, width, 3), 20, dtype=np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 250
    return image


def noise_image(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one: Detections | None, other: Detections | None) -> None:
    assert one is not None
    assert other is not None
    assert len(one) == len(other) > 0
    assert one.labels.tolist() == other.labels.tolist()
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.boxes, other.boxes, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("resize", [FIT, STRETCH], ids=["fit", "stretch"])
@pytest.mark.parametrize("size", [(200, 300), (300, 200), (37, 52), (64, 400)], ids=str)
def test_boxes_are_in_pixels_of_the_given_image(resize: ResizeConfig, size: tuple[int, int]) -> None:
    height, width = size
    box = (width // 4, height // 8, width // 2, height // 2)
    found = Predictor(FindsLamps(), torch.eye(2), NAMES, resize).detect(lamp_image(height, width, box))
    assert found.labels.tolist() == [0]
    assert found.names == NAMES
    # half a pixel of the network's image, which may be coarser than the given one
    coarse = 1 + max(height / 64, width / 64)
    torch.testing.assert_close(found.boxes[0], torch.tensor(box, dtype=torch.float32), atol=coarse, rtol=0)


def test_paths_arrays_and_pil_images_are_one(tmp_path: Path) -> None:
    image = noise_image(50, 80, 1)
    Image.fromarray(image).save(tmp_path / "image.png")
    predictor = Predictor(small_detector(), torch.randn(2, TEXT_WIDTH), NAMES, STRETCH)
    found = predictor.detect(image)
    given = (tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(image))
    for other in given:
        assert_same(found, predictor.detect(other))


@pytest.mark.filterwarnings("error")
def test_a_locked_array_of_the_right_size_is_no_warning() -> None:
    image = np.asarray(Image.fromarray(noise_image(64, 64, 1)))
    assert not image.flags.writeable
    predictor = Predictor(small_detector(), torch.randn(2, TEXT_WIDTH), NAMES, STRETCH)
    assert_same(predictor.detect(image), predictor.detect(image.copy()))


@pytest.mark.parametrize("resize", [FIT, STRETCH], ids=["fit", "stretch"])
def test_many_images_get_the_answers_they_get_alone_in_their_order(resize: ResizeConfig) -> None:
    shapes = [(60, 80), (80, 60), (30, 90), (61, 80), (60, 80), (90, 30), (60, 81)]
    images = [noise_image(*shape, seed) for seed, shape in enumerate(shapes)]
    config = InferenceConfig.checked({"batch_size": 3, "postprocess": {"max_detections": 8}})
    predictor = Predictor(small_detector(), torch.randn(2, TEXT_WIDTH), NAMES, resize, config)
    together = list(predictor.detect_many(images))
    assert [one.size for one in together] == shapes
    for image, prediction in zip(images, together, strict=True):
        assert_same(prediction.detections, predictor.detect(image))


def test_images_share_steps_and_are_read_as_they_are_needed() -> None:
    network = FindsLamps()
    predictor = Predictor(network, torch.eye(2), NAMES, STRETCH, InferenceConfig(batch_size=2))
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield lamp_image(40, 40, (5, 5, 20, 20))

    predictions = predictor.detect_many(endless())
    assert next(predictions).source == "image 0"
    assert network.batches == [2, 2, 2, 2]
    assert len(taken) == 8


def test_a_broken_image_is_an_error_alone_and_a_listed_skip_among_others(tmp_path: Path) -> None:
    good, broken, missing = tmp_path / "good.png", tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    Image.fromarray(lamp_image(40, 60, (10, 10, 30, 30))).save(good)
    broken.write_bytes(b"\xff\xd8\xff\xe0 not an image")
    predictor = Predictor(FindsLamps(), torch.eye(2), NAMES, STRETCH)
    for path in (broken, missing):
        with pytest.raises(DataError, match=path.name):
            predictor.detect(path)
    predictions = list(predictor.detect_many([broken, good, missing, np.zeros((4, 4)), good]))
    assert [one.issue is not None for one in predictions] == [True, False, True, True, False]
    assert [one.detections is None for one in predictions] == [True, False, True, True, False]
    issues = [one.issue for one in predictions if one.issue is not None]
    assert [issue.where for issue in issues] == [str(broken), str(missing), "image 3"]
    assert {issue.kind for issue in issues} == {"unreadable image"}


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), 7], ids=str
)
def test_what_is_no_image_is_named(image: object) -> None:
    with pytest.raises(DataError, match="image 3: expected"):
        load_image(image, "image 3")


def test_modes_are_given_back_and_nothing_needs_a_gradient() -> None:
    network = small_detector()
    network.train()
    network.backbone.eval()
    before = [module.training for module in network.modules()]
    found = Predictor(network, torch.randn(2, TEXT_WIDTH), NAMES, STRETCH).detect(noise_image(40, 40, 0))
    assert [module.training for module in network.modules()] == before
    assert not found.scores.requires_grad


def test_half_precision_is_near() -> None:
    network, text, image = small_detector(), torch.randn(2, TEXT_WIDTH), noise_image(64, 64, 3)
    full, half = (
        Predictor(network, text, NAMES, STRETCH, InferenceConfig(precision=precision)).detect(image)
        for precision in ("fp32", "bf16")
    )
    assert half.scores.dtype == torch.float32
    assert not torch.equal(full.scores, half.scores)
    torch.testing.assert_close(full.scores[:3], half.scores[:3], atol=0.05, rtol=0)


def test_names_must_fit_the_text() -> None:
    with pytest.raises(ModelError, match="one name for each of 2"):
        Predictor(FindsLamps(), torch.eye(2), ("lamp",), STRETCH)
    with pytest.raises(ModelError, match="one name"):
        Predictor(FindsLamps(), torch.zeros(0, 2), (), STRETCH)


def test_text_is_projected_once_until_the_weights_change() -> None:
    """Thousands of names are much of the work; what the network has learnt since is never missed."""
    network = small_detector()
    projected = []
    network.category_extraction.projection.register_forward_hook(lambda *_: projected.append(1))
    text, image = torch.randn(2, TEXT_WIDTH), noise_image(50, 80, 1)
    predictor = Predictor(network, text, NAMES, STRETCH)
    before = predictor.detect(image)
    list(predictor.detect_many([image] * 3))
    assert len(projected) == 1
    with torch.no_grad():
        network.category_extraction.projection.weight.add_(1.0)
    after = predictor.detect(image)
    assert len(projected) == 2
    assert_same(after, Predictor(network, text, NAMES, STRETCH).detect(image))
    assert not torch.equal(before.scores, after.scores)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shortlist_finds_what_is_shortlisted(precision: str) -> None:
    """Of many names, those that the shortlist takes are the only ones that are found, under their own names."""
    config = small_config()
    config = config.model_copy(update={"categories": config.categories.model_copy(update={"shortlist": 6})})
    network, names = small_detector(config), [f"name {i}" for i in range(30)]
    text = torch.nn.functional.normalize(torch.randn(30, TEXT_WIDTH), dim=-1)
    settings = InferenceConfig.checked({"precision": precision})
    found = Predictor(network, text, names, STRETCH, settings).detect(noise_image(64, 64, 2))
    shown = {found.names[label] for label in found.labels.tolist()}
    assert 0 < len(shown) <= 4
    # asked for these alone, the network says the same
    some = sorted(shown, key=names.index)
    alone = Predictor(network, text[[names.index(name) for name in some]], some, STRETCH, settings)
    again = alone.detect(noise_image(64, 64, 2))
    assert {again.names[label] for label in again.labels.tolist()} == shown
