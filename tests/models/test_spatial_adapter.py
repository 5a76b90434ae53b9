"""Convolutions beside a vision transformer: maps of three strides, each of the transformer's channels and their own."""

import pytest
import torch

from metr.errors import ConfigError, ModelError
from metr.models.backbones import Backbone, BackboneConfig, build_backbone
from metr.models.config import DetectorConfig

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}


def config_of(name: str = "dinov3_vit", **options: object) -> BackboneConfig:
    values = {"name": name, "pretrained": False, "freeze_stages": 0, "layers": (1, 3, 4), "adapter": 4}
    return BackboneConfig.model_validate(values | {"options": VIT | options})


def backbone_of() -> Backbone:
    torch.manual_seed(0)
    return build_backbone(config_of()).eval()


@torch.no_grad()
def test_maps_of_three_strides() -> None:
    backbone = backbone_of()
    assert backbone.strides == (8, 16, 32)
    assert backbone.channels == (16 + 8, 16 + 16, 16 + 16)
    for height, width in ((64, 96), (70, 45)):
        maps = backbone(torch.rand(2, 3, height, width))
        shapes = [(2, c, -(-height // s), -(-width // s)) for c, s in zip(backbone.channels, (8, 16, 32), strict=True)]
        assert [tuple(level.shape) for level in maps] == shapes


@torch.no_grad()
def test_an_image_does_not_see_its_batch() -> None:
    backbone, images = backbone_of(), torch.rand(2, 3, 64, 80)
    for level, alone in zip(backbone(images), backbone(images[:1]), strict=True):
        torch.testing.assert_close(level[:1], alone, atol=1e-5, rtol=1e-4)


def test_it_trains_while_the_transformer_is_frozen() -> None:
    backbone = build_backbone(config_of().model_copy(update={"freeze_stages": 4})).train()
    torch.stack([level.square().mean() for level in backbone(torch.rand(2, 3, 64, 64))]).sum().backward()
    for key, parameter in backbone.named_parameters():
        if key.startswith("adapter."):
            assert parameter.grad is not None, key
            assert float(parameter.grad.abs().sum()) > 0, key
        if key.startswith("network.model.layer."):
            assert parameter.grad is None, key


@torch.no_grad()
def test_its_own_configuration_rebuilds_it() -> None:
    first = backbone_of()
    again = build_backbone(first.config).eval()
    again.load_state_dict(first.state_dict())
    images = torch.rand(1, 3, 64, 64)
    for level, other in zip(first(images), again(images), strict=True):
        assert torch.equal(level, other)


@pytest.mark.parametrize("changes", [{"layers": [1, 2]}, {"layers": [], "strides": [8, 16, 32]}, {"strides": [16]}])
def test_it_joins_three_layers(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"adapter joins three layers at strides \[8, 16, 32\]: found layers"):
        BackboneConfig.checked({"layers": [1, 3, 4], "adapter": 4} | changes)


def test_it_needs_patches_of_16_pixels() -> None:
    with pytest.raises(ModelError, match=r"backbone\.adapter needs patches of 16 pixels, found 8"):
        build_backbone(config_of(patch_size=8))


def test_its_maps_are_no_maps_of_one_stride() -> None:
    with pytest.raises(ConfigError, match="takes backbone maps of one stride"):
        DetectorConfig.checked({"backbone": config_of().model_dump(), "encoder": {"kind": "projector"}})
    DetectorConfig.checked({"backbone": config_of().model_dump(), "encoder": {"kind": "hybrid"}})
    plain = config_of().model_dump() | {"adapter": 0}
    with pytest.raises(ConfigError, match=r"need backbone\.adapter"):
        DetectorConfig.checked({"backbone": plain, "encoder": {"kind": "hybrid"}})
