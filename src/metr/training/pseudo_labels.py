"""What the average of the weights says of categories that nobody annotated in an image.

A self-training rule in the manner of mean teachers (Tarvainen and Valpola, 2017; Liu et al., 2021), asked only where
the labels are silent: it never overrules an annotation.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from metr.inference.config import PostprocessConfig
from metr.inference.postprocess import postprocess
from metr.structures import Batch, Detections, DetectorOutput, Targets
from metr.training.config import PseudoLabelConfig


class PseudoLabeler:
    """Sorts the categories unannotated to an image into absent, present and unknown.

    Clearly absent: the average's presence probability is below `absent_below`; then the category is presumed absent.
    Clearly present: it is above `present_above`, and there are detections above `object_above` that no annotated object
    of the category covers; these become objects. Of the rest nothing is known.

    Args:
        config: The thresholds.
        unannotated: Where an image's dataset does not annotate a category, by the dataset's name. Categories that it
            annotates, but not in this very image, are unannotated to none.
    """

    def __init__(self, config: PseudoLabelConfig, unannotated: Mapping[str, Bool[Tensor, "v"]]) -> None:
        self.config, self.unannotated = config, unannotated
        self._detections = PostprocessConfig(
            score_threshold=config.object_above, max_detections=config.objects, nms_iou=config.same_object
        )

    @torch.no_grad()
    def __call__(self, average: nn.Module, batch: Batch, text: Float[Tensor, "v t"]) -> tuple[Targets, ...]:
        """The batch's targets with what `average`, in evaluation mode, adds to them."""
        output: DetectorOutput = average(batch.images, batch.padding_mask, text)
        names = tuple(map(str, range(len(text))))
        # pixels of an image of 1 x 1: shares of the image
        found = postprocess(output, [(1, 1)] * len(batch.targets), names, self._detections)
        presence = output.categories.presence_logits[-1].float().sigmoid()
        return tuple(
            self._taught(target, self.unannotated[dataset].to(text.device), probability, detections)
            for target, dataset, probability, detections in zip(
                batch.targets, batch.datasets, presence, found, strict=True
            )
        )

    def _taught(
        self, target: Targets, unannotated: Bool[Tensor, "v"], presence: Float[Tensor, "v"], found: Detections
    ) -> Targets:
        likely = unannotated & (presence > self.config.present_above)
        new = likely[found.labels] & ~_covered(found, target, self.config.same_object)
        return replace(
            target,
            boxes=torch.cat([target.boxes, xyxy_to_cxcywh(found.boxes[new]).to(target.boxes)]),
            labels=torch.cat([target.labels, found.labels[new].to(target.labels)]),
            assumed_negative=unannotated & (presence < self.config.absent_below),
        )


def _covered(found: Detections, target: Targets, iou: float) -> Bool[Tensor, "q"]:
    """Whether a detection is an object that the image has already, annotated or ignored."""
    boxes = torch.cat([target.boxes, target.ignore_boxes]).to(found.boxes)
    labels: Int[Tensor, "n"] = torch.cat([target.labels, target.ignore_labels])
    same = found.labels.unsqueeze(1) == labels
    return ((pairwise_iou(found.boxes, cxcywh_to_xyxy(boxes)) > iou) & same).any(1)
