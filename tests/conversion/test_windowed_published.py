"""LW-DETR and RF-DETR in the sizes that are published, with random weights: METR has a place for all that detects."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conversion_cases import normalised, stir, texts
from transformers import AutoConfig, AutoModelForObjectDetection

from metr.conversion.convert import giving_to_ours
from metr.conversion.import_ import PublishedDetector, adopt
from metr.conversion.table import adopted_backbone
from metr.conversion.targets import find_target
from metr.models.detector import skeleton
from metr.structures import Queries

from small import TEXT_WIDTH

FACTS = yaml.safe_load((Path(__file__).parent / "windowed_detectors.yaml").read_text())
SIZES = [(name, size) for name, facts in FACTS.items() for size in facts["sizes"]]
STRIDES = (8, 16, 32)
# Group DETR's other groups, and what labels have for themselves
LEFT_OVER = ("model.enc_output", "model.enc_out_", "class_embed.")
# METR's own
OWN = ("category_extraction.", "denoising.", "decoder.similarity.", "proposals.classifier.")


def published(name: str, size: str) -> tuple[Any, int]:
    """The configuration of a size, and the side of its images."""
    facts = FACTS[name]
    chosen = facts["sizes"][size]
    kind = {"lw_detr": "lw_detr_vit", "rf_detr": "rf_detr_dinov2"}[name]
    backbone = {"model_type": kind, **facts["backbone"], **chosen["backbone"]}
    values = facts["common"] | chosen.get("values", {})
    return AutoConfig.for_model(name, backbone_config=backbone, **values), chosen["side"]


def given(name: str, config: Any, model: Any) -> PublishedDetector:
    """What METR takes from a detector."""
    target, state = find_target(name), {key: tensor.detach() for key, tensor in model.state_dict().items()}
    adopted = target.adopt(config, adopted_backbone(config.backbone_config, STRIDES, True), state)  # type: ignore[misc]
    giving = giving_to_ours(state, target.table(config, adopted.config).rows(), adopted.derived)
    return PublishedDetector(title=target.title, config=adopted.config, giving=giving)


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_shape_fits(name: str, size: str) -> None:
    """Without values: all that detects moves, and all that METR shares with the detector is given."""
    config, side = published(name, size)
    with torch.device("meta"):
        model: Any = AutoModelForObjectDetection.from_config(config)
    taken = given(name, config, model)
    network = skeleton(taken.config, TEXT_WIDTH)
    own = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert {key: tensor.shape for key, tensor in taken.giving.state.items()}.items() <= own.items()
    assert [key for key in own if key not in taken.giving.state and not key.startswith(OWN)] == []
    assert [key for key in taken.giving.left_over if not key.startswith(LEFT_OVER)] == []
    assert len(network.backbone.channels) == len(config.backbone_config.out_indices)
    assert side % network.backbone.pad_to == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("lw_detr", "tiny"), ("rf_detr", "nano"), ("rf_detr", "base")])
@torch.no_grad()
def test_the_same_features_and_boxes(name: str, size: str) -> None:
    config, side = published(name, size)
    torch.manual_seed(0)
    model: Any = stir(AutoModelForObjectDetection.from_config(config), by=0.02).eval()
    network, _ = adopt(given(name, config, model), texts())
    network.eval()
    images, padding = torch.rand(1, 3, side, side), torch.zeros(1, side, side, dtype=torch.bool)
    theirs = model(normalised(network, images))
    memory = network.encode(images, padding)
    assert network.class_queries.learned is not None
    content, start = network.class_queries.learned.weight.unsqueeze(0), theirs.init_reference_points
    zero = torch.zeros(content.shape[:2], dtype=torch.int64)
    queries = Queries(content=content, reference_boxes=start, slot=zero, group=zero, valid=zero == 0)
    found = network.decoder(queries, memory)
    torch.testing.assert_close(found.features, theirs.intermediate_hidden_states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.boxes[-1], theirs.pred_boxes, atol=1e-4, rtol=1e-4)
