"""How many queries each name gets in training where that is drawn for each image."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from metr.errors import ConfigError
from metr.models import category_selection
from metr.models.category_selection import drawn_sizes
from metr.models.config import CategoryConfig, DetectorConfig, QueryConfig
from metr.models.detector import Detector
from metr.structures import Targets

from small import TEXT_WIDTH, small_config, small_detector, targets_of

NAMES = 6


def image(labels: list[int], annotated: list[int] | None = None) -> Targets:
    return targets_of([[0.5, 0.5, 0.2, 0.2]] * len(labels), labels, words=NAMES, annotated=annotated)


def config_of(low: int, high: int, **queries: Any) -> DetectorConfig:
    sizes = {"number": 24, "ceiling": 12, "varied": (low, high), "floor": 1} | queries
    return DetectorConfig(queries=QueryConfig(**sizes), categories=CategoryConfig(kept=4))


def test_sizes_are_the_draw_within_what_objects_need_and_names_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain numbers: crowds, images without objects, more names than slots and than queries for each."""
    crowds = [[], [0], [0, 1, 1], [2] * 7, [3] * 15, [0, 1, 2, 3, 4, 5], [0] * 9 + [1], [0] * 9 + [1, 2, 3]]
    targets = Targets.stack([image(labels) for labels in crowds for _ in range(5)])
    lots = torch.linspace(0, 1 - 1e-6, 5).repeat(len(crowds))
    monkeypatch.setattr(category_selection, "_lots", lambda targets: lots)
    found = drawn_sizes(targets, config_of(2, 10))
    assert found is not None
    expected = []
    for labels, lot in zip([labels for labels in crowds for _ in range(5)], lots.tolist(), strict=True):
        drawn = math.floor(2 * (11 / 2) ** lot + 1e-6)
        needed = min(max((labels.count(label) for label in labels), default=0), 12)
        expected.append(min(max(drawn, needed), 24 // max(1, min(4, len({*labels})))))
    assert found.tolist() == expected
    assert {*found[:5].tolist()} == {2, 3, 4, 7, 10}


def test_sizes_are_even_on_a_logarithmic_scale_and_follow_from_the_seeds() -> None:
    images = 1000
    targets = replace(Targets.stack([image([])] * images), noise_seeds=tuple(range(images)))
    found = drawn_sizes(targets, config_of(3, 11))
    assert found is not None
    assert (int(found.min()), int(found.max())) == (3, 11)
    assert float((found < 6).float().mean()) == pytest.approx(0.5, abs=0.05)
    backwards = drawn_sizes(replace(targets, noise_seeds=tuple(range(images))[::-1]), config_of(3, 11))
    assert backwards is not None
    assert torch.equal(backwards.flip(0), found)
    assert drawn_sizes(None, config_of(3, 11)) is None
    assert drawn_sizes(targets, DetectorConfig()) is None


def test_each_name_has_the_drawn_number_and_names_with_objects_come_first() -> None:
    """Of one dataset with six names and one with a single name; detection knows nothing of it."""
    config = small_config(number=24, ceiling=12, varied=(2, 12))
    detector = small_detector(config).train()
    plain = Detector(small_config(number=24, ceiling=12), TEXT_WIDTH).eval()
    plain.load_state_dict(detector.state_dict())
    images, mask, text = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), torch.randn(6, TEXT_WIDTH)
    with torch.no_grad():
        memory = detector.encode(images, mask)
        seen = set()
        for seed in range(12):
            targets = replace(Targets.stack([image([1, 4]), image([2], annotated=[2])]), noise_seeds=(seed, seed + 99))
            output, sizes = detector.detect(memory, text, targets), drawn_sizes(targets, config)
            for row, (present, annotated) in enumerate((({1, 4}, 6), ({2}, 1))):
                size, kept = int(sizes[row]), output.categories.ids[row][output.categories.valid[row]].tolist()
                assert len(kept) == min(annotated, 4, 24 // size)
                assert present <= {*kept}
                slots = output.slot[row][output.valid[row]]
                assert torch.bincount(slots, minlength=4).tolist() == [size] * len(kept) + [0] * (4 - len(kept))
                seen.add((row, size))
        assert len(seen) > 8, "sizes vary, those of the single name too"
        torch.testing.assert_close(detector.eval()(images, mask, text).logits, plain(images, mask, text).logits)


def test_a_range_has_to_be_one() -> None:
    for options, message in (
        ({"varied": (5, 3)}, "is no range"),
        ({"varied": (5, 300)}, "up to the ceiling, 100"),
        ({"varied": (5, 30), "layout": "budget"}, "varied is for layout 'uniform'"),
    ):
        with pytest.raises(ConfigError, match=message):
            QueryConfig.checked(options)
