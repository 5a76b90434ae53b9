"""The network learns four images by heart: every part, from backbone to losses, pulls in one direction."""

import pytest
import torch
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, pairwise_iou
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.models.detector import Detector
from metr.structures import Targets

from small import TEXT_WIDTH, shipped_config, small_detector, targets_of

SIZE = 96
# a vision transformer with random weights learns more slowly
STEPS = {"deformable": 500, "hybrid": 180, "plain": 180, "projector": 600}
RATES = {"deformable": 3e-3, "hybrid": 3e-3, "plain": 2e-3, "projector": 1.5e-3}  # full attention wants a lower one
COLOURS = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.2, 1.0]])
WORDS = 4  # rectangle, ellipse, triangle, and one that is nowhere
Scene = list[tuple[int, list[float]]]
SCENES: list[Scene] = [
    [(0, [0.25, 0.30, 0.30, 0.40]), (1, [0.70, 0.65, 0.35, 0.35])],
    [(2, [0.50, 0.50, 0.40, 0.50])],
    [(1, [0.20, 0.25, 0.25, 0.25]), (1, [0.60, 0.30, 0.30, 0.30]), (0, [0.50, 0.75, 0.50, 0.25])],
    [(2, [0.25, 0.70, 0.30, 0.30]), (0, [0.70, 0.25, 0.35, 0.25]), (1, [0.72, 0.45, 0.30, 0.40])],
]


def random_image(scene: Scene) -> Tensor:
    """Coloured shapes on noise, later ones in front."""
    image = 0.5 + 0.15 * torch.randn(3, SIZE, SIZE)
    place = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(place, place, indexing="ij")
    for label, (cx, cy, width, height) in scene:
        u, v = (x - cx) / (width / 2), (y - cy) / (height / 2)
        rectangle = (u.abs() < 1) & (v.abs() < 1)
        inside = (rectangle, u**2 + v**2 < 1, rectangle & (u.abs() < (v + 1) / 2))[label]
        image[:, inside] = COLOURS[label].unsqueeze(1) + 0.1 * torch.randn(3, int(inside.sum()))
    return image.clamp(0, 1)


def learn(detector: Detector, images: Tensor, text: Tensor, targets: Targets, loss: str) -> None:
    criterion = SetCriterion(CriterionConfig(classification=loss))
    kind = detector.config.encoder.kind
    rate, steps = RATES[kind], STEPS[kind]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    mask = torch.zeros(len(images), SIZE, SIZE, dtype=torch.bool)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(detector(images, mask, text, targets), targets)[0].total.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.trains
@pytest.mark.parametrize(
    ("layout", "encoder", "decoder", "loss"),
    [
        ("budget", "deformable", "deformable", "focal"),
        ("uniform", "hybrid", "deformable", "quality"),
        ("uniform", "hybrid", "distribution", "quality"),
        ("uniform", "plain", "conditional", "focal"),
        ("uniform", "projector", "deformable", "quality"),
    ],
)
def test_overfits_four_images(layout: str, encoder: str, decoder: str, loss: str) -> None:
    """Each object is found once, by a query of its category, and nothing else is found."""
    images = torch.stack([random_image(scene) for scene in SCENES])
    parts = [targets_of([box for _, box in scene], [label for label, _ in scene], words=WORDS) for scene in SCENES]
    targets = Targets.stack(parts)
    text = torch.nn.functional.normalize(torch.randn(WORDS, TEXT_WIDTH), dim=-1)
    detector = small_detector(shipped_config(encoder=encoder, decoder=decoder, kept=3, layout=layout)).train()
    detector.category_extraction.whiten(text, detector.config.categories.whitening)
    learn(detector, images, text, targets, loss)

    detector.eval()
    with torch.no_grad():
        output = detector(images, torch.zeros(4, SIZE, SIZE, dtype=torch.bool), text)
    labels = output.categories.ids.gather(1, output.slot)
    found_once, said_wrongly = 0, 0
    for image, target in enumerate(parts):
        found = output.valid[image] & (output.logits[-1, image].sigmoid() > 0.5)
        overlap = pairwise_iou(cxcywh_to_xyxy(output.boxes[-1, image, found]), cxcywh_to_xyxy(target.boxes[0]))
        right = (overlap > 0.7) & (labels[image, found].unsqueeze(1) == target.labels)
        found_once += int((right.sum(0) == 1).sum())
        said_wrongly += int((right.sum(1) != 1).sum())
    present = output.categories.presence_logits[-1].sigmoid() > 0.5
    assert found_once == int(targets.is_object.sum())
    assert said_wrongly == 0
    assert torch.equal(present, targets.present)
