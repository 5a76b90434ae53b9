"""Distillation: a detector that a METR has become is taught to answer images as the METR does (Hinton et al., 2015).

What METR's queries contain beside their place, their name and their rank, has no counterpart in other detectors. A fit
(`image_fits`) is where these begin. From there some steps of gradient descent on the same images teach the decoder what
METR finds in them: each of METR's detections is an object, and its score what the class head is to say of it. Labels
are not needed. Backbone and encoder stay as they are.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from metr.boxes import cxcywh_to_xyxy, paired_giou, xyxy_to_cxcywh
from metr.conversion.convert import Moved, TransferReport
from metr.conversion.export import Transferred, colours_of
from metr.conversion.export import transfer as transfer_weights
from metr.conversion.images_to_fit import Picture, load
from metr.conversion.import_ import adopt, published_model
from metr.conversion.preprocessing import Preprocessing
from metr.conversion.targets.base import Target
from metr.data.images import ImageSource
from metr.errors import counted
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Predictor
from metr.losses.classification import supervised
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.losses.predictions import query_predictions
from metr.models.detector import Detector
from metr.structures import NO_OBJECT, Detections, DetectorOutput, Memory, Targets
from metr.text.same_names import listed
from metr.training.progress import duration

_logger = logging.getLogger(__name__)

STEPS = 300
"""How many steps teach a detector, by default."""
_BATCH, _WARMUP, _FLOOR, _DECAY, _MOST_NORM = 8, 20, 0.02, 1e-4, 0.5
# of a network as wide as `nano`; of wider ones less
_RATE, _RATE_WIDTH = 5e-4, 128
# detections with a lower score are none
_LEAST_SCORE = 0.03
# of a name that no image shows with such a score METR is not sure
_SURE = ScoreThresholds().default
# what a tensor is changed by at the most on its way to METR and back
_SAME = 1e-5
# steps from one line of progress to the next
_TOLD_EVERY = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What the detector's encoder makes of an image, and what METR finds in it.

    `targets` are of one image, `scores` those of its objects.
    """

    memory: Memory
    targets: Targets
    scores: Float[Tensor, "1 m"]


def distil(
    done: Transferred,
    target: Target,
    teacher: Predictor,
    pictures: Sequence[Picture],
    steps: int = STEPS,
    console: Console | None = None,
) -> Transferred:
    """Teaches a detector of transformers what a METR answers.

    Args:
        done: The METR as that detector. Its model is changed in place.
        target: What kind of detector it is.
        teacher: The METR, with the names of the detector's labels in their order.
        pictures: The images, all readable.
        steps: How many steps of 8 images.
        console: Where progress is shown.

    Returns:
        The same model, with the report of what became of every weight; untaught if METR is sure of nothing there.
    """
    network: Detector = teacher.network  # type: ignore[assignment]
    resize = target.resizes(teacher.resize, network.backbone.pad_to)
    mean, std = colours_of(network)
    preparing = Preprocessing(mean=mean, std=std, resize=resize)
    # no name is to be near another one: each has a direction of its own
    text = torch.eye(len(teacher.names))
    labels = {name: label for label, name in enumerate(teacher.names)}
    student, _ = adopt(published_model(done.model, preparing, target.title, labels), text, text)
    student = student.to(teacher.device).eval()
    pupil = Predictor(student, text, teacher.names, resize)
    lessons = [_lesson(teacher, pupil, load(picture)) for picture in pictures]
    seen = _seen(lessons, len(text))
    if not seen.any():
        return done
    lessons = [_without(one, ~seen) for one in lessons]
    _teach(student, pupil.text, lessons, steps, console or Console(quiet=True))
    taught = transfer_weights(target, student, teacher.names, text)
    before, after = done.model.state_dict(), taught.model.state_dict()
    changed = [key for key, tensor in after.items() if not torch.allclose(tensor, before[key], atol=_SAME)]
    done.model.load_state_dict(after)
    report = _with_taught(done.report, changed, f"taught on {counted(len(lessons), 'image')}", steps)
    unseen = [f'"{name}"' for name, label in labels.items() if not seen[label]]
    told = f"METR is sure of no {listed(unseen)} in these images: how to find that was fitted, and not taught"
    return replace(done, report=replace(report, notes=(*report.notes, *([told] if unseen else []))))


def _seen(lessons: Sequence[Lesson], names: int) -> Bool[Tensor, "v"]:
    """The names of which METR is sure in an image. Of another one these images would teach only that it is absent."""
    sure = torch.zeros(names, dtype=torch.bool, device=lessons[0].scores.device)
    for one in lessons:
        sure[one.targets.labels[one.scores >= _SURE]] = True
    return sure


@torch.no_grad()
def _lesson(teacher: Predictor, pupil: Predictor, image: ImageSource) -> Lesson:
    (seen,) = teacher.detect_prepared([teacher.prepare(image)])
    assert seen.detections is not None
    assert seen.size is not None
    batch = pupil.batch([pupil.prepare(image)])
    network: Detector = pupil.network  # type: ignore[assignment]
    targets, scores = _objects(seen.detections, seen.size)
    return Lesson(memory=network.encode(*batch), targets=targets.to(pupil.device), scores=scores.to(pupil.device))


def _objects(found: Detections, size: tuple[int, int]) -> tuple[Targets, Float[Tensor, "1 m"]]:
    """Detections as the objects of one image, with their scores."""
    kept = found.scores >= _LEAST_SCORE
    height, width = size
    boxes = xyxy_to_cxcywh(found.boxes[kept] / torch.tensor([width, height, width, height]))
    every = torch.ones(1, len(found.names), dtype=torch.bool)
    targets = Targets(
        boxes=boxes.unsqueeze(0),
        labels=found.labels[kept].unsqueeze(0),
        ignore_boxes=torch.zeros(1, 0, 4),
        ignore_labels=torch.zeros(1, 0, dtype=torch.long),
        annotated=every,
        assumed_negative=~every,
    )
    return targets, found.scores[kept].unsqueeze(0)


def _without(lesson: Lesson, unseen: Bool[Tensor, "v"]) -> Lesson:
    """The same, which says nothing about some names."""
    targets = lesson.targets
    out = unseen[targets.labels]
    return Lesson(
        memory=lesson.memory,
        targets=replace(targets, labels=targets.labels.masked_fill(out, NO_OBJECT), annotated=~unseen.unsqueeze(0)),
        scores=lesson.scores.masked_fill(out, 0.0),
    )


def _teach(
    student: Detector, text: Float[Tensor, "v v"], lessons: Sequence[Lesson], steps: int, console: Console
) -> None:
    """Trains all but backbone and encoder."""
    for key, parameter in student.named_parameters():
        parameter.requires_grad_(not key.startswith(("backbone.", "encoder.")))
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    rate = _RATE * min(1.0, _RATE_WIDTH / student.config.width)
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
    criterion, draw = SetCriterion(CriterionConfig()), torch.Generator().manual_seed(0)
    began, total = time.monotonic(), 0.0
    for step in track(range(steps), "teaching", console=console, transient=True, disable=not console.is_terminal):
        memory, targets, scores = _together(_drawn(lessons, draw))
        loss = lesson_loss(student.detect(memory, text), targets, scores, criterion)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learning, _MOST_NORM)
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % _TOLD_EVERY == 0:
            left = (time.monotonic() - began) * (steps - step - 1) / (step + 1)
            line = f"step {step + 1}/{steps}, loss {total / _TOLD_EVERY:.3f}, {duration(left)} left"
            _logger.info("%s", line)
            total = 0.0


def lesson_loss(
    output: DetectorOutput, targets: Targets, scores: Float[Tensor, "b m"], criterion: SetCriterion
) -> Float[Tensor, ""]:
    """How far answers are from a METR's, for each object that it is sure of.

    Queries and objects are matched as in training. A matched query is to say the object's score (quality focal loss,
    Li et al., 2020), all others nothing; its box counts as much as that score.

    Args:
        output: The answers.
        targets: What METR found.
        scores: How sure it was of each object.
        criterion: Matches, and gives the terms their weights.
    """
    predictions = query_predictions(output)
    matches = criterion.match(predictions, targets)
    predictions = predictions.matched(matches)
    wanted = torch.zeros_like(predictions.logits)
    wanted[matches.layer, matches.image, matches.query] = scores[matches.image, matches.target]
    asked = supervised(predictions, targets, criterion.config.ignore_coverage)
    entropy = functional.binary_cross_entropy_with_logits(predictions.logits, wanted, reduction="none")
    classification = (entropy * (predictions.logits.sigmoid() - wanted).square() * asked).sum()
    boxes = targets.boxes_of(predictions.target)
    found = predictions.boxes.where(predictions.positive.unsqueeze(-1), boxes)
    l1 = ((found - boxes).abs().sum(-1) * wanted).sum()
    giou = ((1 - paired_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))) * wanted).sum()
    weights = criterion.config.weights
    total = weights.classification * classification + weights.l1 * l1 + weights.giou * giou
    return total / scores.sum().clamp(min=1)


def _share_of_rate(step: int, steps: int) -> float:
    """Warm-up, then half a cosine."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / _WARMUP) * (_FLOOR + (1 - _FLOOR) * cosine)


def _drawn(lessons: Sequence[Lesson], draw: torch.Generator) -> list[Lesson]:
    """Some lessons whose images have one shape: that of one of them."""
    first = lessons[int(torch.randint(len(lessons), (1,), generator=draw))]
    alike = [one for one in lessons if one.memory.level_shapes == first.memory.level_shapes]
    rows: Int[Tensor, "n"] = torch.randint(len(alike), (_BATCH,), generator=draw)
    return [alike[row] for row in rows.tolist()]


def _together(lessons: Sequence[Lesson]) -> tuple[Memory, Targets, Float[Tensor, "b m"]]:
    targets = Targets.stack([one.targets for one in lessons])
    most = targets.labels.shape[1]
    scores = [functional.pad(one.scores, (0, most - one.scores.shape[1])) for one in lessons]
    memory = Memory(
        tokens=torch.cat([one.memory.tokens for one in lessons]),
        padding_mask=torch.cat([one.memory.padding_mask for one in lessons]),
        level_shapes=lessons[0].memory.level_shapes,
        valid_ratios=torch.cat([one.memory.valid_ratios for one in lessons]),
    )
    return memory, targets, torch.cat(scores)


def _with_taught(report: TransferReport, changed: Sequence[str], how: str, steps: int) -> TransferReport:
    """The report where some tensors have learned since."""
    learned = set(changed)
    moved = [*report.copied, *report.reshaped]
    fresh = [Moved(key=key, source=(), how=how) for key in report.afresh if key in learned]
    taught = [replace(one, how=how) for one in moved if one.key in learned]
    return replace(
        report,
        taught=steps,
        copied=tuple(one for one in report.copied if one.key not in learned),
        reshaped=(*(one for one in report.reshaped if one.key not in learned), *taught, *fresh),
        afresh=tuple(key for key in report.afresh if key not in learned),
    )
