"""Objects for images of noise, for measuring how long a step takes."""

import torch

from metr.structures import Targets

CATEGORIES_SHOWN = 6  # in an image


def objects(mean: int, names: int, random: torch.Generator) -> Targets:
    """About as many objects as asked for, of six categories; their sides' logarithms spread evenly, 1/60 to 1/2."""
    number = int(torch.randint(mean * 2 // 3, mean * 4 // 3 + 1, (1,), generator=random))
    shown = torch.randperm(names, generator=random)[:CATEGORIES_SHOWN]
    sides = (1 / 30) ** torch.rand(number, 2, generator=random) / 2
    centres = sides / 2 + torch.rand(number, 2, generator=random) * (1 - sides)
    return Targets(
        boxes=torch.cat([centres, sides], dim=1).unsqueeze(0),
        labels=shown[torch.randint(len(shown), (1, number), generator=random)],
        ignore_boxes=torch.zeros(1, 0, 4),
        ignore_labels=torch.zeros(1, 0, dtype=torch.int64),
        annotated=torch.ones(1, names, dtype=torch.bool),
        assumed_negative=torch.zeros(1, names, dtype=torch.bool),
    )
