"""Backbones: exact against references, frozen where they say so, and every learning weight reached by a gradient."""

import copy
import json
from pathlib import Path

import cv2
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from metr.errors import ConfigError, ModelError
from metr.models.backbones import Backbone, BackboneConfig, build_backbone
from metr.models.backbones.base import FrozenBatchNorm, SimplePyramid, freeze_batch_norms
from metr.models.backbones.efficientnet_lite import (
    ConvNorm,
    EfficientNetLite,
    EfficientNetLiteClassifier,
    packaged_weights,
    same_convolution,
)

TINY = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "swin": {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 64},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56},
    "dinov3_vit": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32},
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 48], "depths": [1, 1, 1, 1], "num_groups": 4},
    "hgnet_v2": {
        "embedding_size": 16,
        "stem_channels": [3, 8, 16],
        "hidden_sizes": [8, 16, 24, 32],
        "stage_in_channels": [16, 8, 16, 24],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1, 1, 1, 1],
    },
}


def tiny(name: str, **values: object) -> Backbone:
    """A small backbone with random weights and lively batch norms."""
    values = {"freeze_stages": 0} | values
    options = TINY.get(name, {})
    backbone = build_backbone(BackboneConfig(name=name, pretrained=False, options=options, **values))
    stir(backbone)
    return backbone


def stir(module: nn.Module) -> None:
    """Moves statistics, scales and shifts of batch norms off 0 and 1."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d | FrozenBatchNorm):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.1)


def closeness(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --- every backbone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["efficientnet_lite0", *TINY])
def test_maps_have_the_promised_channels_and_cells(name: str) -> None:
    backbone = tiny(name).eval()
    first, second, third = backbone.strides
    assert second == 2 * first
    assert third == 2 * second
    for height, width in ((64, 96), (70, 45)):
        maps = backbone(torch.rand(2, 3, height, width))
        expected = [
            (2, c, -(-height // s), -(-width // s)) for c, s in zip(backbone.channels, backbone.strides, strict=True)
        ]
        assert [tuple(level.shape) for level in maps] == expected


@pytest.mark.parametrize("name", ["efficientnet_lite0", *TINY])
def test_every_weight_that_is_not_frozen_gets_a_gradient(name: str) -> None:
    backbone = tiny(name, freeze_stages=1).train()
    # Random coefficients: the sum of normalised features is constant, and a constant has no gradient.
    loss = torch.stack([(level * torch.randn_like(level)).sum() for level in backbone(torch.rand(2, 3, 64, 64))]).sum()
    loss.backward()
    learning = {key: parameter for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert learning
    assert [key for key, parameter in learning.items() if parameter.grad is None] == []
    dead = [key for key, parameter in learning.items() if not parameter.grad.abs().sum() > 0]
    # Softmax cancels what is added to every key alike.
    assert [key for key in dead if "key.bias" not in key and "k_proj.bias" not in key] == []


@pytest.mark.parametrize("name", ["efficientnet_lite0", *TINY])
def test_an_image_does_not_see_its_batch(name: str) -> None:
    backbone = tiny(name).eval()
    images = torch.rand(3, 3, 64, 80)
    with torch.no_grad():
        together = backbone(images)
        alone = [backbone(image[None]) for image in images]
    for index, level in enumerate(together):
        assert closeness(torch.cat([maps[index] for maps in alone]), level) < 1e-5


@pytest.mark.trains
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet", "swin", "dinov2"])
@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_frozen_stages_stay_as_they_are(name: str, stages: int) -> None:
    backbone = tiny(name, freeze_stages=stages, freeze_batch_norm=False).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    learning = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    for _ in range(2):
        loss = torch.stack([(level * torch.randn_like(level)).sum() for level in backbone(torch.rand(4, 3, 64, 64))])
        if learning:
            loss.sum().backward()
            torch.optim.SGD(learning, lr=0.1).step()
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    stems = {"efficientnet_lite0": "trunk.stem.", "resnet": "embedder.", "swin": "embeddings.", "dinov2": "embeddings."}
    firsts = {"efficientnet_lite0": "stages.1.", "resnet": "stages.0.", "swin": "layers.0.blocks", "dinov2": "layer.0."}
    lasts = {"efficientnet_lite0": "stages.6.", "resnet": "stages.3.", "swin": "layers.3.", "dinov2": "layer.3."}
    assert any(stems[name] in key for key in changed) == (stages < 1)
    assert any(firsts[name] in key for key in changed) == (stages < 1)
    assert any(lasts[name] in key for key in changed) == (stages < 4)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet", "hgnet_v2"])
def test_frozen_batch_norm_equals_batch_norm_in_evaluation_and_stays(name: str) -> None:
    plain = tiny(name, freeze_batch_norm=False).eval()
    frozen = tiny(name, freeze_batch_norm=True)
    frozen.load_state_dict(plain.state_dict())  # also: the state of either fits the other
    plain.load_state_dict(frozen.state_dict())
    images = torch.rand(2, 3, 64, 64)
    before = copy.deepcopy(frozen.state_dict())
    frozen.train()
    found, expected = frozen(images), plain(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert closeness(ours, theirs) < 1e-5
    for network, maps in ((frozen, found), (plain, expected)):
        torch.stack([level.square().mean() for level in maps]).sum().backward()
        assert any(parameter.grad is not None for parameter in network.parameters())
    gradients = {key: parameter.grad for key, parameter in plain.named_parameters()}
    for key, parameter in frozen.named_parameters():
        assert closeness(parameter.grad, gradients[key]) < 1e-4, key
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key]), key
    copied = copy.deepcopy(frozen)
    with torch.no_grad():
        copied.load_state_dict({key: value * 1.5 for key, value in frozen.state_dict().items()})
        assert closeness(frozen(images)[-1], expected[-1]) < 1e-5, "a copy shares no norm with its original"


@pytest.mark.parametrize("name", ["efficientnet_lite0", *TINY])
def test_its_own_configuration_rebuilds_it(name: str) -> None:
    backbone = tiny(name, strides=(8, 16), freeze_stages=1).eval()
    values = json.loads(backbone.config.model_dump_json())
    again = build_backbone(BackboneConfig.checked(values)).eval()
    again.load_state_dict(backbone.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert again.channels == backbone.channels
    assert again.strides == backbone.strides
    for ours, theirs in zip(again(images), backbone(images), strict=True):
        assert torch.equal(ours, theirs)


def test_colours_can_be_set() -> None:
    first = tiny("resnet", pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1)).eval()
    second = tiny("resnet", pixel_mean=(0.5, 0.25, 0.125), pixel_std=(0.5, 1, 2)).eval()
    second.load_state_dict(first.state_dict())
    images = torch.rand(1, 3, 64, 64)
    shifted = (images - torch.tensor([0.5, 0.25, 0.125])[:, None, None]) / torch.tensor([0.5, 1, 2])[:, None, None]
    assert torch.allclose(second(images)[0], first(shifted)[0], atol=1e-6)


# --- EfficientNet-Lite ---------------------------------------------------------------------------------------------


def test_same_padding_by_hand() -> None:
    """Four columns, kernel 3, stride 2: TensorFlow pads one zero behind; five columns: one on each side."""
    ones = torch.ones(1, 1, 1, 3)
    four = same_convolution(torch.tensor([1.0, 2, 3, 4]).reshape(1, 1, 1, 4), square(ones), None, stride=2, groups=1)
    assert four.flatten().tolist() == [1 + 2 + 3, 3 + 4]
    five = same_convolution(torch.tensor([1.0, 2, 3, 4, 5]).reshape(1, 1, 1, 5), square(ones), None, stride=2, groups=1)
    assert five.flatten().tolist() == [1 + 2, 2 + 3 + 4, 4 + 5]


def square(row: Tensor) -> Tensor:
    """A kernel of one row between rows of zeros."""
    return pad(row, (0, 0, 1, 1))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (8, 9), (9, 7), (1, 2)])
def test_same_padding_equals_padding_first(size: int, stride: int, shape: tuple[int, int]) -> None:
    images, kernel, bias = torch.randn(2, 4, *shape), torch.randn(4, 1, size, size), torch.randn(4)
    rows, columns = (max((-(-side // stride) - 1) * stride + size - side, 0) for side in shape)
    padded = pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    expected = conv2d(padded, kernel, bias, stride, groups=4)
    found = same_convolution(images, kernel, bias, stride=stride, groups=4)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


def test_packaged_weights_fit_by_name_and_make_the_features() -> None:
    weights = packaged_weights()
    classifier = EfficientNetLiteClassifier()
    own = {key.removeprefix("trunk.") for key in classifier.state_dict()}
    assert own == weights.keys()
    backbone = build_backbone(BackboneConfig()).eval()
    assert backbone.channels == (40, 112, 320)
    assert backbone.strides == (8, 16, 32)
    trunk = EfficientNetLiteClassifier.packaged().trunk
    images = torch.rand(1, 3, 64, 96)
    expected = trunk((images * 255 - 127) / 128)
    for ours, theirs in zip(backbone(images), (expected[2], expected[4], expected[6]), strict=True):
        assert closeness(ours, theirs) < 1e-4


def test_classifier_names_elephants_and_bears(shared: Path) -> None:
    """The reference for the whole network: padding, norms, colours and the order of blocks."""
    right, seen = 0, 0
    classes = {"elephant": {101, 385, 386}, "bear": {294, 295, 296, 297}}
    classifier = EfficientNetLiteClassifier.packaged()
    for image, name in animals(shared / "data" / "coco_mini"):
        with torch.no_grad():
            best = classifier(image[None]).topk(5).indices[0].tolist()
        seen += 1
        right += bool(classes[name] & set(best))
    assert seen >= 5
    assert right >= 0.9 * seen


def animals(root: Path) -> list[tuple[Tensor, str]]:
    """The central squares of images with a large elephant or bear."""
    found = []
    for split in ("train2017", "val2017"):
        truth = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        names = {category["id"]: category["name"] for category in truth["categories"]}
        images = {image["id"]: image for image in truth["images"]}
        for image_id, category in sorted({(a["image_id"], a["category_id"]) for a in truth["annotations"]}):
            image, name = images[image_id], names[category]
            boxes = [
                a["bbox"] for a in truth["annotations"] if (a["image_id"], a["category_id"]) == (image_id, category)
            ]
            share = sum(w * h for _, _, w, h in boxes) / (image["width"] * image["height"])
            if name in ("elephant", "bear") and share > 0.1:
                found.append((square_image(root / split / image["file_name"]), name))
    return found


def square_image(path: Path) -> Tensor:
    """The middle 224 x 224 pixels of an image of 256 pixels' shorter side."""
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    scale = 256 / min(image.shape[:2])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = ((side - 224) // 2 for side in image.shape[:2])
    return torch.from_numpy(image[top : top + 224, left : left + 224]).permute(2, 0, 1).float() / 255


def test_multiples_scale_channels_and_blocks() -> None:
    lite = EfficientNetLite(width=1.2, depth=1.4)
    assert lite.channels == (24, 32, 48, 96, 136, 232, 384)
    assert [len(stage) for stage in lite.stages] == [1, 3, 3, 5, 5, 6, 1]
    with pytest.raises(ConfigError, match="pretrained=false"):
        build_backbone(BackboneConfig(options={"width": 0.5}))
    with pytest.raises(ConfigError, match="no option 'widht'"):
        build_backbone(BackboneConfig(pretrained=False, options={"widht": 0.5}))


def test_stages_past_the_last_map_are_not_built() -> None:
    backbone = tiny("efficientnet_lite0", strides=(4, 8))
    assert backbone.channels == (24, 40)
    assert len(backbone.trunk.stages) == 3


# --- transformers --------------------------------------------------------------------------------------------------


def test_resnet_from_a_folder_equals_transformers(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(**TINY["resnet"])
    model = transformers.ResNetForImageClassification(config).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    backbone = build_backbone(BackboneConfig(name=str(tmp_path))).eval()
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    hidden = model.resnet(normalised, output_hidden_states=True).hidden_states
    assert backbone.channels == (16, 24, 32)
    for ours, theirs in zip(backbone(images), hidden[-3:], strict=True):
        assert closeness(ours, theirs) < 1e-5
    assert not backbone.config.pretrained
    assert build_backbone(backbone.config).load_state_dict(backbone.state_dict())


def test_dinov2_pads_to_whole_patches_and_makes_a_pyramid(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY["dinov2"])).eval()
    model.save_pretrained(tmp_path)
    backbone = build_backbone(BackboneConfig(name=str(tmp_path), pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1))).eval()
    assert backbone.strides == (7, 14, 28)
    assert backbone.channels == (8, 16, 16)
    images = torch.rand(1, 3, 50, 60)
    tokens = model(pad(images, (0, 10, 0, 6))).last_hidden_state[:, 1:]
    expected = tokens.reshape(1, 4, 5, 16).permute(0, 3, 1, 2)
    maps = backbone(images)
    assert closeness(maps[1], expected) < 1e-4
    assert [tuple(level.shape[2:]) for level in maps] == [(8, 9), (4, 5), (2, 3)]
    assert torch.equal(maps[2], nn.functional.max_pool2d(maps[1], 2, ceil_mode=True))


def test_pyramid_comes_near_the_wanted_strides() -> None:
    pyramid = SimplePyramid(12, 16, (4, 8, 16, 32))
    assert pyramid.strides == (4, 8, 16, 32)
    assert pyramid.channels == (3, 6, 12, 12)
    sides = [level.shape[-1] for level in pyramid(torch.rand(1, 12, 6, 6))]
    assert sides == [24, 12, 6, 3]
    assert SimplePyramid(12, 8, (8, 16, 32)).strides == (8, 16, 32)


def test_swin_picks_the_stages_of_the_wanted_strides() -> None:
    assert tiny("swin", strides=(4, 16)).channels == (8, 32)
    idle = {key for key, parameter in tiny("swin").named_parameters() if not parameter.requires_grad}
    assert idle == {"network.swin.layernorm.weight", "network.swin.layernorm.bias"}


def test_resnet_shorthands_need_no_hub_without_weights() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", pretrained=False))
    assert backbone.channels == (128, 256, 512)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 11_176_512 - 9_600  # the norms' are fixed


def test_batch_norms_without_a_known_layer_are_frozen_too() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stir(network)
    images = torch.rand(1, 3, 8, 8)
    expected = network(images)
    freeze_batch_norms(network)
    assert isinstance(network[1], FrozenBatchNorm)
    assert torch.allclose(network.train()(images), expected, atol=1e-6)


def test_conv_norm_learns_its_norm_unless_frozen() -> None:
    layer = ConvNorm(3, 4, 3, stride=2)
    layer(torch.rand(2, 3, 8, 8)).sum().backward()
    assert layer.normalization.weight.grad is not None
    freeze_batch_norms(layer)
    assert [key for key, _ in layer.named_parameters()] == ["convolution.weight"]


# --- errors --------------------------------------------------------------------------------------------------------


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ModelError, match="did you mean 'resnet50'"):
        build_backbone(BackboneConfig(name="resnet5O"))
    with pytest.raises(ConfigError, match="did you mean 'hidden_sizes'"):
        build_backbone(BackboneConfig(name="resnet", pretrained=False, options={"hidden_size": [8]}))
    with pytest.raises(ModelError, match="no backbone in transformers"):
        build_backbone(BackboneConfig(name="bert", pretrained=False))


def test_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"microsoft/resnet-50(.|\n)*connect to the internet once"):
        build_backbone(BackboneConfig(name="resnet50"))


def test_a_folder_without_a_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold config\.json"):
        build_backbone(BackboneConfig(name=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", **TINY["resnet"]}))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot load this model"):
        build_backbone(BackboneConfig(name=str(tmp_path)))


def test_strides_are_checked() -> None:
    with pytest.raises(ConfigError, match="4, 8, 16 and 32"):
        BackboneConfig.checked({"strides": [16, 8]})
    with pytest.raises(ConfigError, match="4, 8, 16 and 32"):
        BackboneConfig.checked({"strides": [8, 64]})
