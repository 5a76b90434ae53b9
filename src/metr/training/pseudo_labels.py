"""Pseudo-labels: predictions of the averaged network for categories that an image's dataset does not annotate.

A self-training rule in the manner of mean teachers (Tarvainen and Valpola, 2017; Liu et al., 2021). It adds only where
annotations say nothing, and never overrules one.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from metr.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from metr.inference.config import PostprocessConfig
from metr.inference.postprocess import postprocess
from metr.structures import NO_OBJECT, Batch, DetectorOutput, Targets
from metr.training.config import PseudoLabelConfig


class PseudoLabeler:
    """Decides which unannotated categories of an image are absent, which are present, and which remain unknown.

    A category is assumed to be absent if its presence probability is below `absent_below`. If that probability is above
    `present_above`, its detections with a score above `object_above` become objects, except those that cover an
    annotated or ignored box of the category. Nothing is known of the others.

    Args:
        config: The thresholds.
        unannotated: For each dataset by name, the categories that it does not annotate. A category that a dataset
            annotates in other images only is not among them.
    """

    def __init__(self, config: PseudoLabelConfig, unannotated: Mapping[str, Bool[Tensor, "v"]]) -> None:
        self.config, self.unannotated = config, unannotated
        self._detections = PostprocessConfig(
            score_threshold=config.object_above, max_detections=config.objects, nms_iou=config.same_object
        )

    @torch.no_grad()
    def __call__(self, average: nn.Module, batch: Batch, text: Float[Tensor, "v t"]) -> Targets:
        """The batch's targets with the pseudo-labels of `average`, which is in evaluation mode."""
        output: DetectorOutput = average(batch.images, batch.padding_mask, text)
        presence = output.categories.presence_logits[-1].float().sigmoid()
        unannotated = torch.stack([self.unannotated[dataset] for dataset in batch.datasets]).to(presence.device)
        present = unannotated & (presence > self.config.present_above)
        boxes, labels = self._found(output, vocabulary_size=len(text))
        new = present.gather(1, labels.clamp(min=0)) & ~_known(boxes, labels, batch.targets, self.config.same_object)
        return replace(
            batch.targets,
            boxes=torch.cat([batch.targets.boxes, xyxy_to_cxcywh(boxes).to(batch.targets.boxes)], dim=1),
            labels=torch.cat([batch.targets.labels, labels.where(new, NO_OBJECT)], dim=1),
            assumed_negative=unannotated & (presence < self.config.absent_below),
        )

    def _found(self, output: DetectorOutput, vocabulary_size: int) -> tuple[Float[Tensor, "b n 4"], Int[Tensor, "b n"]]:
        """Boxes (xyxy in 0..1) and labels of the detections of each image, padded."""
        names = tuple(map(str, range(vocabulary_size)))
        # in pixels of an image of 1 x 1
        found = postprocess(output, [(1, 1)] * output.logits.shape[1], names, self._detections)
        boxes = pad_sequence([one.boxes for one in found], batch_first=True)
        return boxes, pad_sequence([one.labels for one in found], batch_first=True, padding_value=NO_OBJECT)


def _known(
    boxes: Float[Tensor, "b n 4"], labels: Int[Tensor, "b n"], targets: Targets, iou: float
) -> Bool[Tensor, "b n"]:
    """Whether a detection is padding, or an object that the targets have already, as an object or as an ignored box."""
    known_boxes = cxcywh_to_xyxy(torch.cat([targets.boxes, targets.ignore_boxes], dim=1).to(boxes))
    known_labels = torch.cat([targets.labels, targets.ignore_labels], dim=1)
    same = labels.unsqueeze(2) == known_labels.unsqueeze(1)
    return (labels == NO_OBJECT) | ((pairwise_iou(boxes, known_boxes) > iou) & same).any(2)
