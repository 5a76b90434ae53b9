"""How fine-tuning goes by default: a table by the number of training images.

Between two rows values are interpolated over the logarithm of the number, and of themselves where they count steps or
are rates. Outside of the table the first or the last row holds. Nothing is frozen and no depth has a lower rate than
another: with few images too, both cost more than they saved (docs/decisions.md).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from metr.config import Tree

# Steps over which the average of the weights warms up, as a share of those that it reaches back.
_WARMING = 0.4


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """One row.

    `rate` is the height of the learning rate as a multiple of pretraining's; `average` are the steps that the average
    of the weights reaches back; `crop`, `zoom_out` and `colour` are the shares of images that are augmented so.
    """

    images: int
    steps: int
    rate: float
    warmup: int
    average: int
    evaluate_every: int
    crop: float
    zoom_out: float
    colour: float

    def tree(self, pretraining_rate: float) -> Tree:
        """The row as a part of a run's configuration."""
        return {
            "augmentation": {"crop": self.crop, "zoom_out": self.zoom_out, "colour": self.colour},
            "train": {
                "optimizer": {"learning_rate": _rounded(self.rate * pretraining_rate)},
                "schedule": {"warmup_steps": self.warmup},
                "ema": {"decay": round(1 - 1 / self.average, 6), "tau": _WARMING * self.average},
                "loop": {
                    "steps": self.steps,
                    "evaluate_every": self.evaluate_every,
                    "checkpoint_every": self.evaluate_every,
                },
            },
        }


# fmt: off
TABLE = (
    Defaults(images=20,     steps=300,    rate=1.0,  warmup=30,  average=60,   evaluate_every=30,   crop=0.50, zoom_out=0.30, colour=0.8),  # noqa: E501
    Defaults(images=200,    steps=1_000,  rate=1.0,  warmup=50,  average=200,  evaluate_every=100,  crop=0.50, zoom_out=0.20, colour=0.7),  # noqa: E501
    Defaults(images=2_000,  steps=5_000,  rate=0.5,  warmup=200, average=1000, evaluate_every=500,  crop=0.35, zoom_out=0.10, colour=0.5),  # noqa: E501
    Defaults(images=20_000, steps=20_000, rate=0.5,  warmup=500, average=4000, evaluate_every=2000, crop=0.35, zoom_out=0.10, colour=0.5),  # noqa: E501
)
# fmt: on


def defaults_for(images: int) -> Defaults:
    """The row for a number of training images, at least 1."""
    images = max(1, images)
    if images <= TABLE[0].images:
        return TABLE[0]
    for lower, upper in pairwise(TABLE):
        if images <= upper.images:
            share = math.log(images / lower.images) / math.log(upper.images / lower.images)
            return _between(lower, upper, share, images)
    return TABLE[-1]


def _between(lower: Defaults, upper: Defaults, share: float, images: int) -> Defaults:
    def counted(first: int, second: int) -> int:
        return int(_rounded(first ** (1 - share) * second**share))

    def mixed(first: float, second: float) -> float:
        return round((1 - share) * first + share * second, 3)

    return Defaults(
        images=images,
        steps=counted(lower.steps, upper.steps),
        rate=_rounded(lower.rate ** (1 - share) * upper.rate**share),
        warmup=counted(lower.warmup, upper.warmup),
        average=counted(lower.average, upper.average),
        evaluate_every=counted(lower.evaluate_every, upper.evaluate_every),
        crop=mixed(lower.crop, upper.crop),
        zoom_out=mixed(lower.zoom_out, upper.zoom_out),
        colour=mixed(lower.colour, upper.colour),
    )


def _rounded(value: float) -> float:
    """A number that can be said: two figures."""
    return float(f"{value:.1e}")
