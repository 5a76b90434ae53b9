"""What each arm begins with: a detector of transformers as METR, an ImageNet backbone or own pretraining leaves it.

All arms of a detector have one configuration: that of the METR whose weights it can take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from closed_set import concatenated
from metr.conversion.convert import giving_to_theirs, receive
from metr.conversion.export import build, transfer, variances
from metr.conversion.targets import find_target
from metr.conversion.targets.base import Target
from metr.conversion.transfer import to_detector
from metr.data.dataset import DetectionDataset
from metr.data.joint import JointData
from metr.data.transforms.pipeline import build_transforms
from metr.hub import quiet
from metr.model import METR
from metr.models.detector import Detector
from metr.text.vocabulary import Vocabulary
from metr.training.recipe import RunConfig
from metr.training.train import training_parts

Arm = Literal["own", "untrained", "joint", "metr"]
ARMS: tuple[Arm, ...] = ("own", "untrained", "joint", "metr")
BACKBONE_ALONE: tuple[Arm, ...] = ("own", "untrained")
"""The arms that know nothing but ImageNet."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A detector, and the METR of its family before its first step: an ImageNet backbone, and the rest at random."""

    target: Target
    recipe: RunConfig
    untrained: METR

    @staticmethod
    def of(detector: str, joint: JointData, recipe: RunConfig) -> "Family":
        """The family by the detector's name; its METR is the one with which pretraining on `joint` begins."""
        parts = training_parts(joint, recipe, Console(quiet=True))
        assert isinstance(parts.network, Detector)
        return Family(target=find_target(detector), recipe=recipe, untrained=METR(parts.network, parts.checkpoint))


def own_start(family: Family, names: Sequence[str], seed: int) -> Any:
    """The ImageNet backbone alone, all else (queries, too) as transformers initialises it."""
    network, target = family.untrained.network, family.target
    model = build(target, network, names, seed)
    ours = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    given = giving_to_theirs(
        ours, target.table(model.config).backbone, variances(network.backbone, model, target.backbone)
    )
    receive(model, given, source="ImageNet", name=target.title)
    return model


def untrained_start(family: Family, names: Vocabulary) -> Any:
    """The ImageNet backbone alone, all else as METR's transfer leaves it before METR has learnt anything.

    What this gains over transformers' own start (queries spread over the image, heads that at first say "no") is no
    context.
    """
    return to_detector(family.untrained, family.target.name, names).model


def metr_start(family: Family, checkpoint: Path, names: Vocabulary) -> Any:
    """What `metr transfer` makes of a pretrained METR."""
    return to_detector(METR.from_pretrained(checkpoint, device="cpu"), family.target.name, names).model


def joint_start(family: Family, folder: Path, names: Vocabulary, seed: int) -> Any:
    """A pretrained detector of transformers with other names: the heads that do not fit them begin as `untrained`'s.

    transformers' own new heads would do worse than that: Deformable DETR's would first say "perhaps" of everything, and
    choose the places of its queries, which no gradient ever reaches, at random.
    """
    from transformers import AutoModelForObjectDetection

    auto: Any = AutoModelForObjectDetection  # its methods have no types
    numbered = dict(enumerate(names.names))
    labels = {"id2label": numbered, "label2id": {name: number for number, name in numbered.items()}}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, told = auto.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True, **labels)
    fresh, ours = untrained_start(family, names).state_dict(), model.state_dict()
    with torch.no_grad():
        for key, *_ in told["mismatched_keys"]:
            ours[key].copy_(fresh[key])
    return model


def pretraining_start(family: Family, joint: JointData) -> Any:
    """With what the detector's own pretraining begins: METR's weights before its first step, for concatenated labels.

    So METR's pretraining and this one begin with the same numbers.
    """
    labels, text = _concatenated_text(family, joint)
    return transfer(family.target, family.untrained.network, labels.names, text).model


def pretraining_data(family: Family, joint: JointData) -> list[DetectionDataset]:
    """The training splits with concatenated labels, augmented as METR's."""
    labels, _ = concatenated(joint.vocabulary)
    transforms = build_transforms(family.recipe.augmentation, training=True)
    return [DetectionDataset(joint.train_split(source), labels, transforms) for source in joint.sources]


def _concatenated_text(family: Family, joint: JointData) -> tuple[Vocabulary, Float[Tensor, "v t"]]:
    """The concatenated labels, and the text embedding of each one's name."""
    labels, names = concatenated(joint.vocabulary)
    embeddings = family.untrained.checkpoint.text_embeddings
    return labels, embeddings[[joint.vocabulary.index_of(name) for name in names]]


def chosen(joint: JointData, recipe: RunConfig, training: bool) -> DetectionDataset:
    """The left-out dataset's training images, augmented as in pretraining, or its val images."""
    source = joint.sources[0]
    split = joint.train_split(source) if training else source.evaluation_split()[1]
    return DetectionDataset(split, joint.vocabulary, build_transforms(recipe.augmentation, training=training))


def bare_names(joint: JointData) -> Vocabulary:
    """The names of a dataset as `metr transfer --names DATASET` takes them."""
    return replace(joint.vocabulary, datasets={})
