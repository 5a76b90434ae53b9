"""Small networks and targets that several tests share."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metr.models.backbones.base import BackboneConfig
from metr.models.config import (
    CategoryConfig,
    DecoderConfig,
    DenoisingConfig,
    DetectorConfig,
    EncoderConfig,
    QueryConfig,
    SimilarityConfig,
)
from metr.models.detector import Detector
from metr.structures import Targets

TEXT_WIDTH = 24

# `make processors` repeats tests with other seeds and with more than one thread
SEED = int(os.environ.get("METR_TEST_SEED", "0"))
THREADS = int(os.environ.get("METR_TEST_THREADS", "1"))


def small_backbone(channels: Sequence[int] = (8, 16, 24)) -> BackboneConfig:
    """A ResNet of a few thousand random weights with these channels at strides 8, 16 and 32."""
    options = {"embedding_size": 8, "hidden_sizes": [8, *channels], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return BackboneConfig(name="resnet", pretrained=False, freeze_stages=0, options=options)


def small_transformer(name: str = "rf_detr_dinov2") -> BackboneConfig:
    """A vision transformer of a few thousand random weights that attends inside four windows; its stride is 8."""
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 96, "patch_size": 8}
    windows = {"num_windows": 2} if name == "rf_detr_dinov2" else {"num_windows": 4, "window_block_indices": [0]}
    return BackboneConfig(name=name, pretrained=False, freeze_stages=0, layers=(1, 2), options=options | windows)


def small_config(
    *, encoder: str = "deformable", decoder: str = "", kept: int = 4, denoising: int = 20, **queries: Any
) -> DetectorConfig:
    """A network that runs in milliseconds.

    A plain encoder comes with the conditional decoder, and a projector with a vision transformer and with boxes as in
    RF-DETR. Queries of places contain no category.
    """
    content = {"content": "place_only"} if queries.get("layout") == "places" else {}
    decoder = decoder or ("conditional" if encoder == "plain" else "deformable")
    form = dict[str, Any]()
    if encoder == "projector":
        form, queries = {"boxes": "reparametrised", "refine": "none", "cross_heads": 8}, {"start": "shifted"} | queries
    return DetectorConfig(
        width=32,
        backbone=small_transformer() if encoder == "projector" else small_backbone(),
        encoder=EncoderConfig(kind=encoder, layers=1, levels=3, heads=4, feed_forward=32, fusion_blocks=1),
        categories=CategoryConfig(blocks=2, heads=4, feed_forward=32, kept=kept),
        queries=QueryConfig(**{"number": 24, "floor": 2, "ceiling": 12, "layout": "uniform"} | content | queries),
        denoising=DenoisingConfig(number=denoising),
        decoder=DecoderConfig(kind=decoder, layers=2, heads=4, feed_forward=32, **form),
    )


def adopted_config(**options: Any) -> DetectorConfig:
    """The small network in the form that takes over RT-DETR and its like."""
    config = small_config(**{"encoder": "hybrid", "layout": "places", "attention": "image"} | options)
    decoder = config.decoder.model_copy(update={"positions": "plain", "predictors": "layer", "box_margin": 1e-5})
    encoder = config.encoder
    if encoder.kind == "hybrid":
        encoder = encoder.model_copy(update={"positions": "counted", "project_memory": decoder.kind == "deformable"})
    similarity = SimilarityConfig(form="classifier")
    return config.model_copy(update={"similarity": similarity, "decoder": decoder, "encoder": encoder})


def softmax_config() -> DetectorConfig:
    """The small network in the form that takes over DETR: learned places, layers without boxes, names that compete."""
    values = small_config(encoder="plain", denoising=0).model_dump()
    values["queries"] |= {"places": "learned", "layout": "places", "content": "none", "point_layers": 0}
    values["decoder"] |= {"kind": "plain", "positions": "learned", "refine": "none", "box_margin": 1e-5}
    values["similarity"] |= {"form": "classifier", "rivals": 6}
    return DetectorConfig.model_validate(values)


def shipped_config(**options: Any) -> DetectorConfig:
    """The small network with what every recipe sets so that categories are told apart from the first step."""
    config = small_config(content="place", **options)
    categories = config.categories.model_copy(update={"whitening": 0.1})
    similarity = SimilarityConfig(token="text", factor=4, objectness=True)
    return config.model_copy(update={"categories": categories, "similarity": similarity})


def small_detector(config: DetectorConfig | None = None) -> Detector:
    """The small network with random weights from the seed, its heads moved off their quiet start."""
    torch.manual_seed(SEED)
    detector = Detector(config or small_config(), TEXT_WIDTH)
    with torch.no_grad():
        decoder = detector.decoder.box
        proposals = [detector.proposals.box] if detector.config.queries.places == "proposed" else []
        for head in (*proposals, *(decoder if isinstance(decoder, nn.ModuleList) else [decoder])):
            head.change.last.weight.normal_(std=0.05)
    return detector


def targets_of(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], *, words: int, annotated: Sequence[int] | None = None
) -> Targets:
    """Targets of one image; every category is annotated unless some are named."""
    known = torch.zeros(1, words, dtype=torch.bool)
    known[0, list(range(words)) if annotated is None else list(annotated)] = True
    return Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4),
        labels=torch.tensor(labels, dtype=torch.int64).unsqueeze(0),
        ignore_boxes=torch.zeros(1, 0, 4),
        ignore_labels=torch.zeros(1, 0, dtype=torch.int64),
        annotated=known,
        assumed_negative=torch.zeros_like(known),
    )
