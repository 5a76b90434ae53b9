import math

import pytest
import torch
from torch import Tensor

from device_waits import DeviceWaits
from metr.boxes import area, clip, cxcywh_to_xyxy, pairwise_iou
from metr.errors import ConfigError, ModelError
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.inference.postprocess import _survivors, postprocess
from metr.structures import Categories, DetectorOutput, Proposals

from small import small_detector

NAMES = ("cat", "dog", "eel", "fox", "gnu")
CALIBRATION = {"cat": (2.0, 1.0), "fox": (0.5, -0.3), "gnu": (1.0, -2.0), "elk": (3.0, 3.0)}
SIZES = ((480, 640), (300, 200), (7, 1000))


def make_output(*, images: int = 3, queries: int = 40, slots: int = 4, tied: bool = False) -> DetectorOutput:
    """Random answers with two decoder layers, invalid queries, an empty slot and boxes across the border."""
    generator = torch.Generator().manual_seed(7)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    logits = rand(2, images, queries) * 6 - 3
    if tied:
        logits = logits.round()
    boxes = torch.cat([rand(2, images, queries, 2) * 1.2 - 0.1, rand(2, images, queries, 2) * 0.6], dim=-1)
    ids = torch.stack([torch.randperm(5, generator=generator)[:slots].sort().values for _ in range(images)])
    slot_valid = torch.ones(images, slots, dtype=torch.bool)
    slot_valid[0, -1] = False
    slot = torch.randint(0, slots, (images, queries), generator=generator)
    valid = rand(images, queries) > 0.2
    return DetectorOutput(
        logits=logits,
        boxes=boxes,
        slot=slot,
        valid=valid,
        categories=Categories(
            presence_logits=rand(2, images, 5) * 4 - 2,
            text=rand(5, 8),
            tokens=rand(images, 5, 8),
            ids=ids.masked_fill(~slot_valid, 0),
            valid=slot_valid,
        ),
        proposals=Proposals(logits=logits[0], boxes=boxes[0], place=slot * 0, slot=slot, rank=slot * 0, valid=valid),
    )


def reference(output: DetectorOutput, image: int, config: PostprocessConfig) -> list[tuple[float, int, Tensor]]:
    """One image, one query after the other."""
    height, width = SIZES[image]
    found = []
    for query in range(output.slot.shape[1]):
        slot = int(output.slot[image, query])
        if not output.valid[image, query] or not output.categories.valid[image, slot]:
            continue
        label = int(output.categories.ids[image, slot])
        score = float(output.logits[-1, image, query].sigmoid())
        score *= float(output.categories.presence_logits[-1, image, label].sigmoid()) ** config.presence_power
        if NAMES[label] in config.calibration:
            scale, shift = config.calibration[NAMES[label]]
            score = 1 / (1 + (1 / score - 1) ** scale * math.exp(-shift))
        corners = cxcywh_to_xyxy(output.boxes[-1, image, query]) * torch.tensor([width, height, width, height])
        corners = clip(corners, float(height), float(width))
        if score >= config.score_threshold and area(corners) > 0:
            found.append((score, label, corners))
    found.sort(key=lambda item: -item[0])
    if config.nms_iou is not None:
        kept: list[tuple[float, int, Tensor]] = []
        for item in found:
            rivals = [k[2] for k in kept if config.nms_across_names or k[1] == item[1]]
            if not rivals or pairwise_iou(item[2].unsqueeze(0), torch.stack(rivals)).max() <= config.nms_iou:
                kept.append(item)
        found = kept
    return found[: config.max_detections]


@pytest.mark.parametrize(
    "config",
    [
        PostprocessConfig(),
        PostprocessConfig(max_detections=5),
        PostprocessConfig(score_threshold=0.4, presence_power=0.5),
        PostprocessConfig(nms_iou=0.2),
        PostprocessConfig(nms_iou=0.1, max_detections=6, presence_power=2.0),
        PostprocessConfig(nms_iou=0.2, nms_across_names=True),
        PostprocessConfig(nms_iou=0.2, nms_across_names=True, score_threshold=0.3, calibration=CALIBRATION),
    ],
    ids=["all", "best five", "threshold and presence", "nms", "nms then best six", "one name a place", "calibrated"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_equals_one_query_after_the_other(config: PostprocessConfig, tied: bool) -> None:
    output = make_output(tied=tied)
    for image, detections in enumerate(postprocess(output, SIZES, NAMES, config)):
        expected = reference(output, image, config)
        assert len(detections) == len(expected) > 0
        assert detections.names == NAMES
        assert detections.labels.tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(detections.scores, torch.tensor([score for score, _, _ in expected]))
        torch.testing.assert_close(detections.boxes, torch.stack([corners for _, _, corners in expected]))


def test_boxes_lie_in_the_original_image_and_scores_descend() -> None:
    for (height, width), found in zip(SIZES, postprocess(make_output(), SIZES, NAMES), strict=True):
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.scores.diff() <= 0).all()


def test_an_image_alone_gives_what_it_gives_in_the_batch() -> None:
    output = make_output()
    together = postprocess(output, SIZES, NAMES, PostprocessConfig(nms_iou=0.5))
    image = 1
    alone = DetectorOutput(
        logits=output.logits[:, image : image + 1],
        boxes=output.boxes[:, image : image + 1],
        slot=output.slot[image : image + 1],
        valid=output.valid[image : image + 1],
        categories=Categories(
            presence_logits=output.categories.presence_logits[:, image : image + 1],
            text=output.categories.text,
            tokens=output.categories.tokens[image : image + 1],
            ids=output.categories.ids[image : image + 1],
            valid=output.categories.valid[image : image + 1],
        ),
        proposals=output.proposals,
    )
    (single,) = postprocess(alone, SIZES[image : image + 1], NAMES, PostprocessConfig(nms_iou=0.5))
    for field in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(single, field), getattr(together[image], field))


def test_nothing_valid_and_nothing_finite_give_nothing() -> None:
    output = make_output()
    output.valid[0] = False
    output.logits[-1, 1] = math.nan
    output.boxes[-1, 2, :, 0] = math.nan
    assert [len(found) for found in postprocess(output, SIZES, NAMES)] == [0, 0, 0]


def test_half_precision_answers_become_float_detections() -> None:
    output = make_output()
    half = DetectorOutput(
        logits=output.logits.bfloat16(),
        boxes=output.boxes.bfloat16(),
        slot=output.slot,
        valid=output.valid,
        categories=output.categories,
        proposals=output.proposals,
    )
    assert all(d.scores.dtype == d.boxes.dtype == torch.float32 for d in postprocess(half, SIZES, NAMES))


def test_names_and_sizes_must_fit() -> None:
    with pytest.raises(ModelError, match="expected 5 names"):
        postprocess(make_output(), SIZES, NAMES[:4])
    with pytest.raises(ModelError, match="sizes of 3 images"):
        postprocess(make_output(), SIZES[:2], NAMES)


def test_configuration_is_checked() -> None:
    with pytest.raises(ConfigError, match="nms_iou"):
        InferenceConfig.checked({"postprocess": {"nms_iou": 2}})
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        InferenceConfig.checked({"batchsize": 2})


def greedy(boxes: Tensor, rivals: Tensor, candidates: Tensor, iou: float) -> list[int]:
    """The survivors of one image, one after the other."""
    kept: list[int] = []
    for row in candidates.nonzero().flatten().tolist():
        better = [one for one in kept if rivals[one] == rivals[row]]
        if not better or pairwise_iou(boxes[row][None], boxes[better]).max() <= iou:
            kept.append(row)
    return kept


@pytest.mark.parametrize("names", [1, 7])
@pytest.mark.parametrize("queries", [1, 127, 128, 129, 400])
def test_suppression_of_many_is_that_one_by_one(queries: int, names: int) -> None:
    """Blocks of rows, chains of boxes that each beat the next one, and images with fewer candidates than others."""
    draw = torch.Generator().manual_seed(queries)
    corner = torch.rand(3, queries, 2, generator=draw) * 60
    boxes = torch.cat([corner, corner + 20 + torch.rand(3, queries, 2, generator=draw) * 20], dim=-1)
    boxes[0, :, 0], boxes[0, :, 2] = torch.arange(queries), torch.arange(queries) + 40.0  # each overlaps the next
    boxes[0, :, 1], boxes[0, :, 3] = 0.0, 10.0
    rivals = torch.randint(0, names, (3, queries), generator=draw)
    candidates = torch.arange(queries) < torch.tensor([[queries], [max(1, queries // 2)], [0]])
    expected = [greedy(*one, iou=0.5) for one in zip(boxes, rivals, candidates, strict=True)]
    every = _survivors(boxes, rivals, candidates, 0.5)
    assert [image.nonzero().flatten().tolist() for image in every] == expected
    few = _survivors(boxes, rivals, candidates, 0.5, wanted=5)
    assert [image.nonzero().flatten().tolist()[:5] for image in few] == [image[:5] for image in expected]


def test_the_host_waits_a_few_times_a_batch_however_many_images_it_has() -> None:
    """For the number of candidates of suppression, its rounds, and the numbers of detections."""
    output = small_detector().eval()(torch.rand(3, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.bool), torch.eye(24))
    with DeviceWaits() as waits:
        found = postprocess(output, [(64, 64)] * 3, [str(row) for row in range(24)], PostprocessConfig(nms_iou=0.7))
    assert 3 <= waits.number <= 8
    assert len(found) == 3
