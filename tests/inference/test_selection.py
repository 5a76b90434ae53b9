"""Which names get a slot when detecting, and how many queries each of them gets."""

import pytest
import torch

from metr.errors import ConfigError
from metr.inference.config import SelectionConfig, inference_config
from metr.inference.postprocess import ScoreThresholds
from metr.inference.selection import name_limits
from metr.models.config import CategoryConfig, DetectorConfig, QueryConfig
from metr.structures import Detections, NameLimits
from metr.text.vocabulary import Vocabulary

from small import TEXT_WIDTH, small_config, small_detector

TRAINED = Vocabulary.union({"cells": ("red", "white"), "fish": ("shark", "puffin", "red"), "one": ("table",)})
MODEL = DetectorConfig(
    categories=CategoryConfig(kept=3, threshold=0.1), queries=QueryConfig(number=60, ceiling=40, floor=1)
)


def test_few_names_all_get_a_slot() -> None:
    limits = name_limits(["red", "zebra", "table"], TRAINED, MODEL)
    assert limits.presence.tolist() == [0, 0, 0]
    assert limits.queries.tolist() == [60, 60, 60]


def test_many_names_have_to_be_likely() -> None:
    limits = name_limits(["red", "zebra", "table", "puffin"], TRAINED, MODEL, SelectionConfig(untrained_threshold=0.02))
    assert limits.presence.tolist() == pytest.approx([0.1, 0.02, 0.1, 0.1])


@pytest.mark.parametrize("names", [["red"], ["red", "zebra", "table", "puffin"]])
def test_a_threshold_of_ones_own_holds_for_all(names: list[str]) -> None:
    limits = name_limits(names, TRAINED, MODEL, SelectionConfig(presence_threshold=0.3))
    assert limits.presence.tolist() == pytest.approx([0.3] * len(names))


def test_queries_as_in_training() -> None:
    """A name of two datasets has what the smaller one gave it; untrained names have no limit."""
    limits = name_limits(["red", "shark", "table", "zebra"], TRAINED, MODEL, SelectionConfig(trained_queries=True))
    assert limits.queries.tolist() == [30, 20, 40, 60]


def test_a_ceiling_of_ones_own_holds_for_all() -> None:
    own = SelectionConfig(most_queries=25)
    assert name_limits(["red", "zebra"], TRAINED, MODEL, own).queries.tolist() == [25, 25]
    both = SelectionConfig(most_queries=25, trained_queries=True)
    assert name_limits(["red", "shark", "table", "zebra"], TRAINED, MODEL, both).queries.tolist() == [25, 20, 25, 25]


@pytest.mark.parametrize("layout", ["uniform", "budget", "shared"])
def test_no_name_has_more_queries_than_its_limit(layout: str) -> None:
    config = small_config()
    config = config.model_copy(update={"queries": config.queries.model_copy(update={"layout": layout, "floor": 1})})
    network = small_detector(config).eval()
    text, images = torch.randn(4, TEXT_WIDTH), torch.rand(2, 3, 64, 64)
    limits = NameLimits(presence=torch.zeros(4), queries=torch.tensor([1, 2, 3, 2]))
    with torch.inference_mode():
        output = network(images, torch.zeros(2, 64, 64, dtype=torch.bool), text, limits=limits)
    for image in range(2):
        labels = output.categories.ids[image, output.slot[image]][output.valid[image]]
        counts = torch.bincount(labels, minlength=4)
        assert (counts <= limits.queries).all()
        assert (counts > 0).any()


def test_only_confident_detections_are_shown() -> None:
    found = Detections(
        boxes=torch.rand(4, 4),
        scores=torch.tensor([0.9, 0.5, 0.4, 0.2]),
        labels=torch.tensor([0, 1, 0, 1]),
        names=("a", "b"),
    )
    shown = ScoreThresholds(default=0.45, names={"b": 0.2}, same_place=None).shown(found)
    assert shown.scores.tolist() == pytest.approx([0.9, 0.5, 0.2])
    assert shown.labels.tolist() == [0, 1, 1]
    assert torch.equal(shown.boxes, found.boxes[[0, 1, 3]])


def test_one_name_is_shown_for_each_place() -> None:
    """The same turtle under two names, a cup half beside it, and the best name too weak to be shown."""
    turtle, beside, other = [10.0, 10, 50, 50], [30.0, 10, 70, 50], [100.0, 100, 140, 140]
    found = Detections(
        boxes=torch.tensor([turtle, other, turtle, beside, other]),
        scores=torch.tensor([0.9, 0.8, 0.5, 0.45, 0.4]),
        labels=torch.tensor([0, 2, 1, 1, 1]),
        names=("turtle", "cup", "frog"),
    )
    shown = ScoreThresholds(default=0.3, names={"frog": 0.85}).shown(found)
    assert shown.scores.tolist() == pytest.approx([0.9, 0.45, 0.4]), "what is not shown suppresses nothing"
    assert [shown.names[label] for label in shown.labels.tolist()] == ["turtle", "cup", "cup"]
    nothing = ScoreThresholds(default=1.0).shown(found)
    assert (len(nothing), tuple(nothing.boxes.shape)) == (0, (0, 4))


def test_a_command_changes_single_settings() -> None:
    config = inference_config(
        ["inference.postprocess.nms_iou=null", "inference.selection.presence_threshold=0.2"],
        batch_size=3,
        postprocess={"score_threshold": 0.5, "nms_iou": None},
    )
    assert (config.batch_size, config.postprocess.nms_iou, config.postprocess.score_threshold) == (3, None, 0.5)
    assert config.selection.presence_threshold == 0.2
    with pytest.raises(ConfigError, match=r"expected keys that begin with inference\., found \['train'\]"):
        inference_config(["train.loop.steps=3"])
    with pytest.raises(ConfigError, match="unknown key 'postproces'"):
        inference_config(["inference.postproces.nms_iou=0.5"])
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        inference_config(postprocess={"nms_iou": 7.0})
