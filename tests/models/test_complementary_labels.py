"""Two datasets of the same images, each labelled for one kind of thing alone: the detector finds both in both."""

import pytest
import torch
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, pairwise_iou
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.structures import Targets

from small import SEED, TEXT_WIDTH, shipped_config, small_detector, targets_of

SIZE, STEPS, RATE, BATCH = 64, 180, 3e-3, 8
COLOURS = torch.tensor([[1.0, 0.1, 0.1], [0.2, 0.2, 1.0]])
CORNERS = torch.tensor([[0.27, 0.27], [0.73, 0.27], [0.27, 0.73], [0.73, 0.73]])


def random_image(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A red rectangle and a blue one on noise, in two of the four corners: pixels, and their boxes [2 4]."""
    image = 0.5 + 0.15 * torch.randn(3, SIZE, SIZE, generator=generator)
    place = (torch.arange(SIZE) + 0.5) / SIZE
    centres = CORNERS[torch.randperm(4, generator=generator)[:2]]
    boxes = torch.cat([centres, 0.25 + 0.2 * torch.rand(2, 2, generator=generator)], dim=1)
    for colour, (cx, cy, width, height) in zip(COLOURS, boxes.tolist(), strict=True):
        inside = ((place - cy).abs() < height / 2).unsqueeze(1) & ((place - cx).abs() < width / 2)
        image[:, inside] = colour.unsqueeze(1) + 0.1 * torch.randn(3, int(inside.sum()), generator=generator)
    return image.clamp(0, 1), boxes


def batch_of(generator: torch.Generator) -> tuple[Tensor, Targets]:
    """Images of two datasets in turn: the first has labels for red alone, the second for blue."""
    images, targets = [], []
    for number in range(BATCH):
        image, boxes = random_image(generator)
        kind = number % 2
        images.append(image)
        targets.append(targets_of([boxes[kind].tolist()], [kind], words=2, annotated=[kind]))
    return torch.stack(images), Targets.stack(targets)


@pytest.mark.slow
@pytest.mark.trains
def test_both_kinds_are_found_in_the_images_of_both_datasets() -> None:
    """With the recipes' settings: from a projection of the text that starts at random, the tokens of both kinds nearly
    coincide after twenty steps, and most seeds then find rectangles whose colour they cannot tell."""
    generator = torch.Generator().manual_seed(SEED)
    text = torch.nn.functional.normalize(torch.randn(2, TEXT_WIDTH), dim=-1)
    detector = small_detector(shipped_config(encoder="hybrid", kept=2)).train()
    detector.category_extraction.whiten(text, detector.config.categories.whitening)
    criterion = SetCriterion(CriterionConfig())
    optimizer = torch.optim.AdamW(detector.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    mask = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.bool)
    for _ in range(STEPS):
        images, targets = batch_of(generator)
        optimizer.zero_grad()
        criterion(detector(images, mask, text, targets), targets)[0].total.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    shown = [random_image(generator) for _ in range(BATCH)]
    with torch.no_grad():
        output = detector.eval()(torch.stack([image for image, _ in shown]), mask, text)
    labels = output.categories.ids.gather(1, output.slot)
    scores = output.logits[-1].sigmoid().masked_fill(~output.valid, -1.0)
    hits = torch.zeros(2)
    for image, (_, boxes) in enumerate(shown):
        for kind in range(2):
            best = scores[image].masked_fill(labels[image] != kind, -1.0).argmax()
            overlap = pairwise_iou(cxcywh_to_xyxy(output.boxes[-1, image, best]).unsqueeze(0), cxcywh_to_xyxy(boxes))
            hits[kind] += float(overlap[0, kind] > 0.5 and scores[image, best] > 0.3)
    assert (hits >= BATCH - 1).all(), f"red and blue rectangles found in {BATCH} images: {hits.tolist()}"
