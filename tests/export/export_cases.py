"""Networks of every family, and how answers are compared."""

import numpy as np
import torch

from metr.data.config import ResizeConfig
from metr.inference.predictor import Predictor
from metr.inference.selection import name_limits
from metr.models.config import BackboneConfig, DetectorConfig
from metr.text.vocabulary import Vocabulary

from small import TEXT_WIDTH, adopted_config, shipped_config, small_config, small_detector

NAMES = ("cat", "dog", "owl", "fox", "bee", "ant")
STRETCH, FIT = ResizeConfig(size=64), ResizeConfig(mode="fit", size=64, longest=96)


def frozen_config(name: str) -> DetectorConfig:
    """The small network on a backbone whose batch norms are constants."""
    config = shipped_config()
    backbone = config.backbone.model_copy(update={"freeze_batch_norm": True})
    if name == "efficientnet_lite0":
        backbone = BackboneConfig(name=name, pretrained=False)
    return config.model_copy(update={"backbone": backbone})


FAMILIES = {
    "deformable": small_config(encoder="deformable"),
    "hybrid": small_config(encoder="hybrid"),
    "conditional": small_config(encoder="plain"),
    "projector": small_config(encoder="projector"),
    "distribution": small_config(encoder="hybrid", decoder="distribution"),
    "budget": small_config(layout="budget"),
    "shared": small_config(layout="shared"),
    "places": adopted_config(),
    "shipped": shipped_config(),
    "frozen resnet": frozen_config("resnet"),
    "efficientnet": frozen_config("efficientnet_lite0"),
}


def predictor_of(config: DetectorConfig, resize: ResizeConfig = STRETCH) -> Predictor:
    """A small network that looks for six names, more than it has slots."""
    network = small_detector(config).eval()
    with torch.no_grad():  # statistics of batch norms that are not those of the start
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(std=0.2)
    text = torch.nn.functional.normalize(torch.randn(len(NAMES), TEXT_WIDTH), dim=-1)
    limits = name_limits(NAMES, Vocabulary.of(NAMES), config)
    return Predictor(network, text, NAMES, resize, limits=limits)


def assert_same(found, expected, names) -> None:
    """Detections of `metr.deploy` against METR's: the same objects in the same order."""
    assert [names[label] for label in found.labels] == [expected.names[label] for label in expected.labels.tolist()]
    np.testing.assert_allclose(found.scores, expected.scores.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes.numpy(), rtol=1e-3, atol=1e-3)
