"""Shares of the datasets: by size, and by how hard they are."""

import numpy as np
import pytest

from metr.config import merge
from metr.data.config import HardnessConfig, LoaderConfig
from metr.data.mixture import hardness_weights, mixture_weights
from metr.errors import ConfigError, DataError

LENGTHS = {"cells": 205, "fish": 13, "cards": 1, "tables": 7}


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("proportional", [1, 4, 16]),
        ("sqrt", [1, 2, 4]),
        ("equal", [1, 1, 1]),
        ({"b": 3.0, "a": 1.0, "c": 0.0}, [1, 3, 0]),
    ],
)
def test_mixture_weights(mixture: object, expected: list[float]) -> None:
    weights = mixture_weights({"a": 10, "b": 40, "c": 160}, mixture)  # type: ignore[arg-type]
    assert list(weights) == ["a", "b", "c"]
    np.testing.assert_allclose(list(weights.values()), np.array(expected) / sum(expected))


def test_mixtures_that_do_not_fit_say_so() -> None:
    with pytest.raises(ConfigError, match=r"'cels'(.|\n)*did you mean 'cells'"):
        mixture_weights(LENGTHS, {"cels": 1.0, "fish": 1.0})
    with pytest.raises(ConfigError, match="no share for cards, tables"):
        mixture_weights(LENGTHS, {"cells": 1.0, "fish": 1.0})
    with pytest.raises(ConfigError, match="zero"):
        mixture_weights(LENGTHS, dict.fromkeys(LENGTHS, 0.0))
    for share in (float("inf"), 1e308):
        with pytest.raises(ConfigError, match="finite"):
            mixture_weights(LENGTHS, dict.fromkeys(LENGTHS, share))
    for share in (float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="mixture"):
            LoaderConfig.checked({"mixture": {"cells": share}})
    with pytest.raises(DataError, match="a, c: no images"):
        mixture_weights({"a": 0, "b": 4, "c": 0}, "sqrt")
    with pytest.raises(DataError, match="no dataset"):
        mixture_weights({}, "sqrt")


def plain_det(lengths: list[int], losses: list[float]) -> list[float]:
    """The published rule, by image: L / min L * sqrt(max S / S); a dataset's share is that of all its images."""
    image = [loss / min(losses) * (max(lengths) / length) ** 0.5 for loss, length in zip(losses, lengths, strict=True)]
    share = [one * length for one, length in zip(image, lengths, strict=True)]
    return [one / sum(share) for one in share]


def test_hardness_is_the_published_rule() -> None:
    losses = [0.8, 2.1, 0.3, 1.7]
    base = mixture_weights(LENGTHS, HardnessConfig().base)
    found = hardness_weights(base, dict(zip(LENGTHS, losses, strict=True)), HardnessConfig())
    assert list(found) == list(LENGTHS)
    np.testing.assert_allclose(list(found.values()), plain_det(list(LENGTHS.values()), losses), rtol=1e-12)


def test_power_and_floor() -> None:
    base, losses = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1.0, "b": 4.0, "c": 9.0}
    raw = np.array([0.5 * 1, 0.3 * 2, 0.2 * 3])
    found = hardness_weights(base, losses, HardnessConfig(power=0.5, floor=0.25))
    np.testing.assert_allclose(list(found.values()), 0.25 * np.array([0.5, 0.3, 0.2]) + 0.75 * raw / raw.sum())
    assert sum(found.values()) == pytest.approx(1)
    assert hardness_weights(base, losses, HardnessConfig(power=0)) == pytest.approx(base)
    assert hardness_weights(base, losses, HardnessConfig(floor=1)) == pytest.approx(base)


def test_what_is_not_known_yet() -> None:
    base = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert hardness_weights(base, {}, HardnessConfig()) == base
    assert hardness_weights(base, {"a": 0.0}, HardnessConfig()) == base
    found = hardness_weights(base, {"a": 1.0, "b": 3.0}, HardnessConfig())
    raw = np.array([0.5 * 1, 0.3 * 3, 0.2 * 2])
    np.testing.assert_allclose(list(found.values()), raw / raw.sum())
    # a dataset that is left out stays out, and shares never sum to zero
    assert hardness_weights({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 5.0}, HardnessConfig()) == {"a": 1.0, "b": 0.0}


def test_the_configuration_of_hardness() -> None:
    plain = LoaderConfig(mixture="equal")
    assert (plain.base_mixture, plain.with_base_mixture({"a": 1.0}).mixture) == ("equal", {"a": 1.0})
    hard = LoaderConfig.checked(merge({"mixture": "hardness"}, {"hardness": {"base": "equal", "every": 50}}))
    assert hard.base_mixture == "equal"
    weighted = hard.with_base_mixture({"a": 1.0})
    assert (weighted.mixture, weighted.base_mixture, weighted.hardness.every) == ("hardness", {"a": 1.0}, 50)
    with pytest.raises(ConfigError, match=r"'hardness.floor'"):
        LoaderConfig.checked({"hardness": {"floor": 2}})
    with pytest.raises(ConfigError, match=r"mixture"):
        LoaderConfig.checked({"mixture": "hardnes"})
