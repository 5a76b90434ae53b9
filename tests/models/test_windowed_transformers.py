"""Vision transformers with windows: several maps of one stride, images of any shape, weights of a DINOv2."""

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from metr.data.config import ResizeConfig
from metr.errors import ConfigError, ModelError
from metr.inference.predictor import Predictor
from metr.models.backbones import Backbone, BackboneConfig, build_backbone
from metr.models.config import DetectorConfig, EncoderConfig
from metr.models.detector import skeleton
from metr.models.encoders import build_encoder

from small import TEXT_WIDTH, small_config, small_detector, small_transformer

WINDOWED = ("lw_detr_vit", "rf_detr_dinov2")


def built(name: str, **values: object) -> Backbone:
    config = small_transformer(name)
    torch.manual_seed(0)
    backbone = build_backbone(config.model_copy(update=values)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_each_layer_gives_a_map_of_the_same_stride(name: str) -> None:
    backbone = built(name)
    assert (backbone.channels, backbone.strides) == ((24, 24), (8, 8))
    assert (backbone.pad_to, backbone.multiple) == (16, 16)
    maps = backbone(torch.rand(2, 3, 50, 90))
    assert [tuple(level.shape) for level in maps] == [(2, 24, 7, 12)] * 2
    assert not torch.allclose(maps[0], maps[1])


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_its_configuration_rebuilds_it(name: str) -> None:
    backbone, images = built(name), torch.rand(1, 3, 64, 64)
    again = build_backbone(backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    assert all(torch.equal(*pair) for pair in zip(again(images), backbone(images), strict=True))


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_a_cell_of_a_wide_image_sees_its_own_pixels(name: str) -> None:
    """Where no layer looks beyond a window, a change in one corner reaches the cells of that corner alone."""
    options = small_transformer(name).options
    alone = {"window_block_indices": [0, 1]} if name == "lw_detr_vit" else {"window_block_indexes": [0, 1]}
    backbone = built(name, options=options | alone)
    images = torch.rand(1, 3, 32, 96)
    changed = images.clone()
    changed[..., :8, :8] = 1 - changed[..., :8, :8]
    moved = (backbone(images)[-1] != backbone(changed)[-1]).any(1)[0]
    assert moved[0, 0]
    assert not moved[:, 6:].any()


@torch.no_grad()
def test_a_square_image_is_not_padded_further() -> None:
    """RF-DETR's windows are right on square images, so that other images become squares."""
    backbone = built("rf_detr_dinov2")
    assert backbone.pads_to_square
    assert not built("lw_detr_vit").pads_to_square
    image = torch.rand(1, 3, 48, 96)
    whole = torch.zeros(1, 3, 96, 96)
    whole[:, :, :48] = image
    for ours, theirs in zip(backbone(image), backbone(whole), strict=True):
        assert torch.equal(ours, theirs[:, :, :6])


@pytest.mark.parametrize("windows", [1, 2])
@torch.no_grad()
def test_a_dinov2_gets_windows(windows: int, tmp_path: Path) -> None:
    """Its weights are all taken; in one window it computes what DINOv2 does."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=56)
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    common = {"name": str(tmp_path), "freeze_stages": 0, "layers": (1, 3)}
    options = {"model_type": "rf_detr_dinov2", "num_windows": windows}
    backbone = build_backbone(BackboneConfig(**common, options=options)).eval()
    own, state = backbone.network.state_dict(), model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())
    assert backbone.network.config.window_block_indexes == [0, 2]
    images = torch.rand(1, 3, 56, 56)
    plain = build_backbone(BackboneConfig(**common)).eval()
    assert torch.allclose(plain(images)[-1], backbone(images)[-1], atol=1e-5) == (windows == 1)


def test_layers_that_there_are_not() -> None:
    with pytest.raises(ModelError, match=r"has 2 layers, and backbone\.layers asks for number 9"):
        built("rf_detr_dinov2", layers=(1, 9))
    resnet = BackboneConfig(name="resnet18", pretrained=False, layers=(1,))
    with pytest.raises(ModelError, match=r"backbone\.layers is for plain vision transformers"):
        build_backbone(resnet)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": {"layers": [2, 1]}}, "ascending order"),
        ({"backbone": {"layers": [1, 2]}}, "for encoder.kind 'projector'"),
        ({"encoder": {"kind": "projector"}}, "maps of one stride"),
        ({"encoder": {"scales": [0.5, 2.0]}}, "some of 2, 1 and 0.5 in this order"),
        ({"encoder": {"scales": [3.0]}}, "some of 2, 1 and 0.5 in this order"),
        ({"decoder": {"cross_heads": 7}}, "not divisible by 7 heads"),
        ({"encoder": {"kind": "plain"}, "decoder": {"kind": "conditional", "boxes": "reparametrised"}}, "'deformable'"),
    ],
)
def test_parts_that_do_not_suit_each_other(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectorConfig.checked(values)


def test_one_map_of_a_network_with_stages_is_projected_too() -> None:
    config = small_config(encoder="projector")
    backbone = small_config().backbone.model_copy(update={"strides": (16,)})
    encoder = config.encoder.model_copy(update={"scales": (2.0, 1.0, 0.5)})
    detector = small_detector(config.model_copy(update={"backbone": backbone, "encoder": encoder}))
    memory = detector.encode(torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert memory.level_shapes == ((8, 12), (4, 6), (2, 3))


def test_wide_maps_are_narrowed_before_they_grow() -> None:
    encoder = build_encoder((516, 24), 32, EncoderConfig(kind="projector", scales=(2.0,), fusion_expansion=0.5))
    memory = encoder([torch.rand(1, 516, 2, 3), torch.rand(1, 24, 2, 3)], torch.zeros(1, 16, 24, dtype=torch.bool))
    assert memory.level_shapes == ((4, 6),)


def test_its_skeleton_has_no_values() -> None:
    for name in WINDOWED:
        config = small_config(encoder="projector").model_copy(update={"backbone": small_transformer(name)})
        network = skeleton(config, TEXT_WIDTH)
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_images_are_padded_as_the_windows_need() -> None:
    detector = small_detector(small_config(encoder="projector"))
    text = torch.randn(1, TEXT_WIDTH)
    assert Predictor(detector, text, ["a"], ResizeConfig()).multiple == 16
    assert Predictor(small_detector(), text, ["a"], ResizeConfig()).multiple == 32
