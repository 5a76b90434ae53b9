"""The targets of a training step: pseudo-labels, a sample of a large vocabulary, the seeds of denoising noise."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence

from metr.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from metr.data.sampling import RandomStream, generator
from metr.inference.config import PostprocessConfig
from metr.inference.postprocess import postprocess
from metr.losses.criterion import LossCounts, average_over_ranks
from metr.models.detector import Detector
from metr.structures import NO_OBJECT, Batch, DetectorOutput, Targets
from metr.training.config import LoopConfig, PseudoLabelConfig
from metr.training.name_variation import NameVariation

Asked = tuple[Tensor, Targets]
"""The text embeddings of the names that a batch is asked for, and the targets indexed by those names."""


class PseudoLabeler:
    """Decides which unannotated categories of an image are absent, which are present, and which remain unknown.

    A category is assumed to be absent if its presence probability is below `absent_below`. If that probability is above
    `present_above`, its detections with a score above `object_above` become objects, except those that cover an
    annotated or ignored box of the category. All other categories remain unknown.

    Args:
        config: The thresholds.
        unannotated: For each dataset by name, the categories that it does not annotate. A category that a dataset
            annotates in other images only is not among them.
    """

    def __init__(self, config: PseudoLabelConfig, unannotated: Mapping[str, Bool[Tensor, "v"]]) -> None:
        self.config, self.unannotated = config, unannotated
        self._detections = PostprocessConfig(
            score_threshold=config.object_above,
            max_detections=config.objects,
            nms_iou=config.same_object,
            presence_power=0.0,
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
        # an image size of 1 x 1 pixels gives boxes in 0..1
        found = postprocess(output, [(1, 1)] * output.logits.shape[1], names, self._detections)
        boxes = pad_sequence([one.boxes for one in found], batch_first=True)
        return boxes, pad_sequence([one.labels for one in found], batch_first=True, padding_value=NO_OBJECT)


def _known(
    boxes: Float[Tensor, "b n 4"], labels: Int[Tensor, "b n"], targets: Targets, iou: float
) -> Bool[Tensor, "b n"]:
    """Whether a detection is padding, or covers an object or ignored box of its category in the targets."""
    known_boxes = cxcywh_to_xyxy(torch.cat([targets.boxes, targets.ignore_boxes], dim=1).to(boxes))
    known_labels = torch.cat([targets.labels, targets.ignore_labels], dim=1)
    same = labels.unsqueeze(2) == known_labels.unsqueeze(1)
    return (labels == NO_OBJECT) | ((pairwise_iou(boxes, known_boxes) > iou) & same).any(2)


class StepTargets:
    """Makes what a step asks of the network out of a batch: its names, its targets, and the seeds of its noise.

    Whatever is drawn at random here follows from the seed and the number of the sample alone. So several processes draw
    what one process with all their images would, and a resumed run what an uninterrupted one would.

    Args:
        text: The embeddings of the whole vocabulary [v t], on the device.
        loop: The seed, and how many names a step uses.
        teacher: Adds pseudo-labels; None adds none.
        variation: Calls names by other words; None leaves them.
        rank: This process's number.
        world: The number of processes.
    """

    def __init__(
        self,
        text: Tensor,
        loop: LoopConfig,
        teacher: PseudoLabeler | None,
        rank: int = 0,
        world: int = 1,
        variation: NameVariation | None = None,
    ) -> None:
        self.text, self.loop, self.teacher = text, loop, teacher
        self.variation = None if variation is None or variation.changes_nothing else variation
        self.rank, self.world = rank, world

    def __call__(self, batch: Batch, average: nn.Module | None, first: int) -> Asked:
        """The text embeddings of the names that the batch is asked for, and the targets indexed by those names.

        Args:
            batch: On the device.
            average: The average of the weights, which makes pseudo-labels.
            first: The number of the first of the samples that all processes take together.
        """
        targets = batch.targets
        if self.teacher is not None and average is not None:
            targets = self.teacher(average, batch, self.text)
        targets = replace(targets, noise_seeds=self._noise_seeds(first, len(targets.boxes)))
        text = self.text
        if self.variation is not None:
            text = self.variation.named(first)
        if 0 < self.loop.vocabulary_sample < len(text):
            seed = int(generator(self.loop.seed, RandomStream.NAMES, first).integers(2**63))
            rows = sample_vocabulary(targets, self.loop.vocabulary_sample, torch.Generator().manual_seed(seed))
            text, targets = text[rows], narrowed(targets, rows)
        if self.variation is None:
            return text, targets
        return self.variation.with_absent(text, targets, batch.datasets, first)

    def of_all(self, batches: Sequence[Batch], average: nn.Module | None, first: int) -> list[Asked]:
        """The same for all batches of a step, of which `first` begins the first one."""
        asked = []
        for batch in batches:
            asked.append(self(batch, average, first))
            first += len(batch.images) * self.world
        return asked

    def _noise_seeds(self, first: int, images: int) -> tuple[int, ...]:
        numbers = range(first + self.rank, first + images * self.world, self.world)
        streams = (generator(self.loop.seed, RandomStream.NOISE, number) for number in numbers)
        return tuple(int(stream.integers(2**63)) for stream in streams)


def shared_counts(targets: Sequence[Targets], network: nn.Module) -> LossCounts | None:
    """What the losses of a step's batches are divided by, so that their mean is the loss of all their images together.

    It is known before the network has seen any of them, as each batch is forgotten before the next. So positive
    denoising queries are counted as if all names with objects had slots: too many in an image that has fewer slots.

    Args:
        targets: Of each batch.
        network: Whose denoising queries they are.

    Returns:
        The mean counts of a batch, of all processes; None for a single batch, which counts its own.
    """
    if len(targets) == 1:
        return None
    denoising = network.denoising if isinstance(network, Detector) else None
    objects = torch.stack([one.is_object.sum() for one in targets]).sum()
    noised = torch.zeros_like(objects)
    if denoising is not None:
        noised = torch.stack([denoising.positives(one).sum() for one in targets]).sum()
    return LossCounts(*(average_over_ranks(torch.stack([objects, noised])) / len(targets)).unbind())


# Greater than any round: a name that is never sampled.
_NEVER = torch.inf


def sample_vocabulary(targets: Targets, limit: int, generator: torch.Generator | None = None) -> Int[Tensor, "n"]:
    """The rows of the vocabulary that a step uses, in ascending order; at least one.

    All present names come first, even if they are more than the limit. Then negatives are sampled from the annotated
    names, in rounds: in each round every image adds one of its own names at random. If room is left, names that are
    assumed to be absent are sampled in the same way. Names of which nothing is known in any image teach nothing, and
    are left out.

    The loss of the sampled negatives is not scaled up. Presence losses are sums over names, so a smaller sample gives
    negatives less weight against what is present.

    Several processes sample together, from the images of all; each must call this with a generator in the same state.

    Args:
        targets: What is known of the images, in terms of the whole vocabulary.
        limit: Largest number of names; 0, or the size of the vocabulary, takes all of them and samples nothing.
        generator: Source of the random numbers, on the CPU; by default torch's own.
    """
    vocabulary_size, device = targets.annotated.shape[1], targets.annotated.device
    if not 0 < limit < vocabulary_size:
        return torch.arange(vocabulary_size, device=device)
    # a name that has only ignored boxes in an image is no negative there
    known = targets.present, targets.annotated & ~targets.ignored, targets.assumed_negative & ~targets.ignored
    has_object, sure, assumed_negative = _of_all_processes(torch.stack(known)).unbind()
    present = has_object.any(0)
    lots = torch.rand(3, len(has_object), vocabulary_size, generator=generator).to(device, non_blocking=True)
    annotated = _rounds(sure, lots[0])
    assumed = _rounds(assumed_negative, lots[1]) + vocabulary_size
    # lots are random numbers below 1: they order the names of one round
    priority = torch.stack([annotated, assumed]).amin(dim=(0, 1)) + lots[2, 0]
    priority = priority.masked_fill(present, -1)
    # the only values that the host waits for, in one transfer
    names_present, names_known = torch.stack([present.sum(), (priority < _NEVER).sum()]).tolist()
    number = max(1, min(max(limit, names_present), names_known))
    return priority.topk(number, largest=False).indices.sort().values


def _of_all_processes(masks: Bool[Tensor, "n b v"]) -> Bool[Tensor, "n _b v"]:
    """The masks of the images of all processes, in the order of their samples."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return masks
    # numbers, as not every backend exchanges truth values
    own = masks.to(torch.uint8).contiguous()
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    return torch.stack(parts, dim=2).flatten(1, 2).bool()


def _rounds(members: Bool[Tensor, "b v"], lots: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """The round, from 0, in which each image adds each member, by ascending `lots`; infinity for non-members."""
    order = lots.masked_fill(~members, 2).argsort(dim=1)
    return order.argsort(dim=1).float().masked_fill(~members, _NEVER)


def narrowed(targets: Targets, rows: Int[Tensor, "n"]) -> Targets:
    """The targets for these rows of the vocabulary alone, renumbered; objects of other rows become padding."""
    # label -1 (padding) indexes the extra last entry, which is -1
    place = torch.full((targets.annotated.shape[1] + 1,), NO_OBJECT, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    return replace(
        targets,
        labels=place[targets.labels],
        ignore_labels=place[targets.ignore_labels],
        annotated=targets.annotated[:, rows],
        assumed_negative=targets.assumed_negative[:, rows],
    )
