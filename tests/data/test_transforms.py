"""Transforms keep boxes on their pixels, objects in their images, and rows together."""

import colorsys

import cv2
import numpy as np
import pytest
from pydantic import ValidationError
from transformers.image_transforms import get_size_with_aspect_ratio

from metr.data.config import MEAN_COLOUR, AugmentationConfig, ResizeConfig
from metr.data.transforms import (
    Jitter,
    Sample,
    Window,
    build_transforms,
    colour_matrix,
    draw_crop,
    draw_jitter,
    draw_zoom_out,
    flip,
    output_shape,
    recolour,
    resize_image,
    view,
)

PLAIN = AugmentationConfig(colour=0.0)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8)


def painted(rng: np.random.Generator, count: int = 4) -> Sample:
    """Filled rectangles that do not overlap, one a cell of a 3 x 2 grid; the label says the colour."""
    height, width = int(rng.integers(150, 400)), int(rng.integers(150, 400))
    image = np.full((height, width, 3), MEAN_COLOUR, np.uint8)
    cells = rng.permutation(6)[:count]
    boxes = np.zeros((count, 4))
    for row, cell in enumerate(cells):
        left, top = (cell % 3) * width // 3, (cell // 3) * height // 2
        w, h = int(rng.integers(12, width // 3)), int(rng.integers(12, height // 2))
        x = left + int(rng.integers(0, width // 3 - w + 1))
        y = top + int(rng.integers(0, height // 2 - h + 1))
        image[y : y + h, x : x + w] = COLOURS[cell]
        boxes[row] = x, y, x + w, y + h
    return Sample(image=image, boxes=boxes, labels=cells.astype(np.int64), ignore=rng.random(count) < 0.2)


def extent(image: np.ndarray, label: int) -> np.ndarray | None:
    """The xyxy box of the pixels that are nearer to a label's colour than to anything else."""
    palette = np.concatenate([COLOURS, [MEAN_COLOUR]]).astype(np.float32)
    # The nearest colour by squared distance, less the pixel's own square, which all have in common.
    nearest = ((palette**2).sum(1) - 2 * image.astype(np.float32) @ palette.T).argmin(-1)
    rows, columns = np.nonzero(nearest == label)
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def bare(sample: Sample) -> Sample:
    return Sample(image=sample.image, boxes=np.zeros((0, 4)), labels=sample.labels[:0], ignore=sample.ignore[:0])


def test_flipping_twice_is_the_identity() -> None:
    sample = painted(np.random.default_rng(0))
    once, twice = flip(sample), flip(flip(sample))
    assert not np.array_equal(once.boxes, sample.boxes)
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_array_equal(twice.boxes, sample.boxes)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("resize", [ResizeConfig(size=224), ResizeConfig(mode="fit", size=180, longest=300)])
def test_boxes_stay_on_their_pixels(seed: int, resize: ResizeConfig) -> None:
    rng = np.random.default_rng(seed)
    sample = painted(rng)
    result = build_transforms(PLAIN.model_copy(update={"resize": resize}), training=True)(sample, rng)
    assert result.image.shape[:2] == output_shape(*result.image.shape[:2], resize)
    assert (result.boxes[:, 2:] > result.boxes[:, :2]).all()
    for box, label in zip(result.boxes, result.labels, strict=True):
        if min(box[2] - box[0], box[3] - box[1]) < 4:
            continue
        found = extent(result.image, int(label))
        assert found is not None
        # Interpolation blurs an edge over one pixel of the output, or of the source where that is larger.
        np.testing.assert_allclose(found, box, atol=1.6)
    # What is seen at all has a box, ignored or not.
    for label in set(sample.labels.tolist()) - set(result.labels.tolist()):
        left = extent(result.image, label)
        assert left is None or min(left[2] - left[0], left[3] - left[1]) <= 1


@pytest.mark.parametrize("seed", range(60))
def test_crop_keeps_an_object_with_its_centre(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = painted(rng, count=1 + seed % 5)
    if sample.ignore.all():
        sample.ignore[0] = False
    min_visible = [0.1, 0.4, 0.9, 1.0][seed % 4]
    window = draw_crop(sample, (0.02, 0.3), 2.0, min_visible, rng)
    corners = window.corners
    assert (corners[:2] >= 0).all()
    assert window.left + window.width <= sample.width
    assert window.top + window.height <= sample.height
    objects = sample.boxes[~sample.ignore]
    centres = (objects[:, :2] + objects[:, 2:]) / 2
    inside = ((centres >= corners[:2]) & (centres <= corners[2:])).all(axis=1)
    clipped = np.clip(objects, corners[[0, 1, 0, 1]], corners[[2, 3, 2, 3]])
    share = np.prod(np.maximum(clipped[:, 2:] - clipped[:, :2], 0), axis=1) / np.prod(
        objects[:, 2:] - objects[:, :2], axis=1
    )
    assert (inside & (share >= min_visible - 1e-9)).any()
    result = view(sample, window, (64, 64), fill=MEAN_COLOUR, min_visible=min_visible)
    assert (~result.ignore).any()


def test_crop_of_objects_at_fractions_of_pixels_and_at_the_border() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((37, 53, 3), np.uint8)
    boxes = np.array([[10.3, 4.2, 11.1, 4.9], [52.4, 36.1, 53.0, 37.0], [0.0, 0.0, 53.0, 37.0], [0.0, 0.0, 0.2, 37.0]])
    for row in range(4):
        one = Sample(image=image, boxes=boxes[row : row + 1], labels=np.zeros(1, np.int64), ignore=np.zeros(1, bool))
        for _ in range(200):
            window = draw_crop(one, (0.001, 0.2), 3.0, 0.5, rng)
            result = view(one, window, (32, 32), fill=MEAN_COLOUR, min_visible=0.5)
            assert result.ignore.tolist() == [False]


def test_half_visible_objects_are_ignored_and_hidden_ones_go() -> None:
    boxes = np.array([[10, 10, 30, 30], [38, 10, 58, 30], [30, 10, 45, 30], [60, 60, 80, 80], [0, 0, 100, 50]], float)
    ignore = np.array([False, False, False, False, True])
    sample = Sample(image=np.zeros((100, 100, 3), np.uint8), boxes=boxes, labels=np.arange(5), ignore=ignore)
    window = Window(left=0, top=0, width=40, height=40)
    result = view(sample, window, (80, 80), fill=MEAN_COLOUR, min_visible=0.5)
    assert result.labels.tolist() == [0, 1, 2, 4]
    # Ten percent, two thirds, and a crowd of which a third is left.
    assert result.ignore.tolist() == [False, True, False, True]
    np.testing.assert_allclose(result.boxes, [[20, 20, 60, 60], [76, 20, 80, 60], [60, 20, 80, 60], [0, 0, 80, 80]])


@pytest.mark.parametrize("seed", range(10))
def test_zoom_out_holds_the_whole_image_and_fills_the_rest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = painted(rng)
    sample = Sample(
        image=np.full_like(sample.image, 255), boxes=sample.boxes, labels=sample.labels, ignore=sample.ignore
    )
    window = draw_zoom_out(sample, 3.0, rng)
    result = view(sample, window, (96, 96), fill=(1, 2, 3), min_visible=0.5)
    assert len(result.boxes) == len(sample.boxes)
    np.testing.assert_array_equal(result.ignore, sample.ignore)
    white = (result.image == 255).all(-1)
    assert white.mean() == pytest.approx(sample.width * sample.height / (window.width * window.height), abs=0.03)
    assert (result.image[~white] == (1, 2, 3)).all()


def test_zoom_out_of_a_sliver_stays_on_the_canvas() -> None:
    rng = np.random.default_rng(0)
    sample = bare(
        Sample(
            image=np.zeros((400, 1, 3), np.uint8),
            boxes=np.zeros((0, 4)),
            labels=np.zeros(0, np.int64),
            ignore=np.zeros(0, bool),
        )
    )
    for _ in range(100):
        result = view(sample, draw_zoom_out(sample, 60.0, rng), (16, 16), fill=MEAN_COLOUR, min_visible=0.5)
        assert result.image.shape == (16, 16, 3)


def test_evaluation_only_resizes() -> None:
    sample = painted(np.random.default_rng(5))
    result = build_transforms(AugmentationConfig(resize=ResizeConfig(size=96)), training=False)(sample)
    np.testing.assert_array_equal(result.image, cv2.resize(sample.image, (96, 96), interpolation=cv2.INTER_AREA))
    scale = [96 / sample.width, 96 / sample.height] * 2
    np.testing.assert_allclose(result.boxes, sample.boxes * scale)
    np.testing.assert_array_equal(result.labels, sample.labels)
    np.testing.assert_array_equal(result.ignore, sample.ignore)


@pytest.mark.parametrize("training", [True, False])
def test_empty_images_work(training: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        result = build_transforms(AugmentationConfig(resize=ResizeConfig(size=64)), training)(bare(painted(rng)), rng)
        assert result.image.shape == (64, 64, 3)
        assert result.boxes.shape == (0, 4)


def test_one_pixel_image_works() -> None:
    rng = np.random.default_rng(1)
    sample = Sample(
        image=np.zeros((1, 1, 3), np.uint8),
        boxes=np.array([[0.0, 0.0, 1.0, 1.0]]),
        labels=np.zeros(1, int),
        ignore=np.zeros(1, bool),
    )
    for _ in range(50):
        assert len(build_transforms(AugmentationConfig(), training=True)(sample, rng).boxes) == 1


def test_the_generator_decides_everything() -> None:
    sample = painted(np.random.default_rng(3))
    transforms = build_transforms(AugmentationConfig(), training=True)
    results = [transforms(sample, np.random.default_rng(seed)) for seed in (7, 7, 8)]
    np.testing.assert_array_equal(results[0].image, results[1].image)
    np.testing.assert_array_equal(results[0].boxes, results[1].boxes)
    assert not np.array_equal(results[0].image, results[2].image)


def test_the_source_is_left_alone() -> None:
    sample = painted(np.random.default_rng(3))
    image, boxes, ignore = sample.image.copy(), sample.boxes.copy(), sample.ignore.copy()
    transforms = build_transforms(AugmentationConfig(resize=ResizeConfig(mode="fit", size=min(image.shape[:2]))), True)
    for seed in range(20):
        transforms(sample, np.random.default_rng(seed))
    np.testing.assert_array_equal(sample.image, image)
    np.testing.assert_array_equal(sample.boxes, boxes)
    np.testing.assert_array_equal(sample.ignore, ignore)


def test_shapes() -> None:
    fit = ResizeConfig(mode="fit", size=800, longest=1333)
    assert output_shape(480, 640, fit) == (800, 1066)
    assert output_shape(480, 1280, fit) == (500, 1333)
    for height, width in np.random.default_rng(0).integers(2, 3000, (500, 2)).tolist():
        if max(height, width) < 1333 * min(height, width):
            assert output_shape(height, width, fit) == get_size_with_aspect_ratio((height, width), 800, 1333)
    assert output_shape(480, 640, fit, size=480) == (480, 640)
    assert output_shape(480, 640, ResizeConfig(size=320)) == (320, 320)
    assert output_shape(480, 640, ResizeConfig(size=320), size=256) == (256, 256)
    assert output_shape(10000, 3, fit)[1] >= 1


def test_resizing_averages_where_it_shrinks_and_interpolates_where_it_grows() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.ptp(resize_image(stripes, 16, 16)) == 0
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:, 32:] = 200
    # Shrinking one way and growing the other must not copy pixels in blocks.
    assert len(np.unique(resize_image(ramp, 16, 256))) > 3
    assert resize_image(ramp, 64, 64) is ramp


def test_colour_matrix_turns_each_knob() -> None:
    grey, red = np.array([90.0, 90.0, 90.0, 1.0]), np.array([200.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(colour_matrix(Jitter(), 50.0) @ red, red[:3], atol=1e-9)
    np.testing.assert_allclose(colour_matrix(Jitter(brightness=1.5), 50.0) @ red, [300, 0, 0], atol=1e-9)
    np.testing.assert_allclose(colour_matrix(Jitter(contrast=0.5), 50.0) @ grey, [70, 70, 70], atol=1e-9)
    np.testing.assert_allclose(colour_matrix(Jitter(saturation=0.0), 50.0) @ red, [59.8, 59.8, 59.8], atol=1e-6)
    np.testing.assert_allclose(colour_matrix(Jitter(saturation=1.7, hue=0.2), 50.0) @ grey, grey[:3], atol=1e-9)
    turned = colour_matrix(Jitter(hue=0.05), 50.0) @ red
    assert float(np.array([0.299, 0.587, 0.114]) @ turned) == pytest.approx(59.8, abs=0.01)
    hue = colorsys.rgb_to_hsv(*(np.clip(turned, 0, 255) / 255))[0]
    assert min(abs(hue - 0.05), abs(hue - 0.95)) < 0.03


def test_recolour_cuts_at_the_ends_and_keeps_boxes() -> None:
    sample = painted(np.random.default_rng(0))
    result = recolour(sample, Jitter(brightness=10.0))
    assert result.image.dtype == np.uint8
    assert result.image.max() == 255
    assert result.boxes is sample.boxes
    still = recolour(
        sample, draw_jitter(AugmentationConfig(brightness=0, contrast=0, saturation=0, hue=0), np.random.default_rng(0))
    )
    np.testing.assert_array_equal(still.image, sample.image)


def test_switched_off_augmentation_equals_evaluation() -> None:
    sample = painted(np.random.default_rng(2))
    off = AugmentationConfig(flip=0, crop=0, zoom_out=0, colour=0, resize=ResizeConfig(size=100))
    trained, evaluated = (
        build_transforms(off, True)(sample, np.random.default_rng(0)),
        build_transforms(off, False)(sample),
    )
    np.testing.assert_array_equal(trained.image, evaluated.image)
    np.testing.assert_array_equal(trained.boxes, evaluated.boxes)


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        AugmentationConfig(crop=0.7, zoom_out=0.7)
    with pytest.raises(ValidationError, match="least"):
        AugmentationConfig(crop_area=(0.9, 0.2))
