"""ResNets under torchvision's names: every one of them, and the same numbers under transformers'."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, max_pool2d, relu

from metr.conversion.published.timm import resnet_options, resnet_rows
from metr.conversion.table import to_ours, to_theirs

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_names(blocks: tuple[int, ...], convolutions: int, first_shortcut: bool = True) -> list[str]:
    """As torchvision names the parameters and buffers of a ResNet, without the classifier."""
    names = ["conv1.weight", *(f"bn1.{part}" for part in NORM)]
    for layer, number in enumerate(blocks, start=1):
        for block in range(number):
            place = f"layer{layer}.{block}"
            for convolution in range(1, convolutions + 1):
                names.append(f"{place}.conv{convolution}.weight")
                names += [f"{place}.bn{convolution}.{part}" for part in NORM]
            if block == 0 and (layer > 1 or first_shortcut):
                names.append(f"{place}.downsample.0.weight")
                names += [f"{place}.downsample.1.{part}" for part in NORM]
    return names


def backbone(**options: Any) -> Any:
    from transformers import AutoBackbone, ResNetConfig

    auto: Any = AutoBackbone
    return auto.from_config(ResNetConfig(**options, out_features=["stage1", "stage2", "stage3", "stage4"]))


@pytest.mark.parametrize(
    ("blocks", "kind", "widths", "number"),
    [
        ((3, 4, 6, 3), "bottleneck", (256, 512, 1024, 2048), 53),
        ((2, 2, 2, 2), "basic", (64, 128, 256, 512), 20),
    ],
    ids=["resnet50", "resnet18"],
)
def test_every_name_has_its_place(blocks: tuple[int, ...], kind: str, widths: tuple[int, ...], number: int) -> None:
    bottleneck = kind == "bottleneck"
    names = torchvision_names(blocks, 3 if bottleneck else 2, first_shortcut=bottleneck)
    # a convolution and a norm of five tensors each, as torchvision's models have without their classifiers
    assert len(names) == len(set(names)) == number * 6
    moved = to_ours(dict.fromkeys(names, torch.zeros(1)), resnet_rows("", ""))
    assert moved.left_over == ()
    with torch.device("meta"):
        theirs = backbone(depths=list(blocks), hidden_sizes=list(widths), layer_type=kind)
    assert set(moved.state) == set(theirs.state_dict())
    assert set(to_theirs(moved.state, resnet_rows("", "")).state) == set(names)


def convolved(state: dict[str, Tensor], images: Tensor, convolution: str, norm: str, **how: int) -> Tensor:
    """A convolution and its batch norm in evaluation."""
    weight, bias, mean, variance = (state[f"{norm}.{part}"] for part in NORM[:4])
    return batch_norm(conv2d(images, state[f"{convolution}.weight"], **how), mean, variance, weight, bias)


def torchvision_maps(state: dict[str, Tensor], images: Tensor, bottleneck: bool) -> list[Tensor]:
    """The maps of the four layers, written down from torchvision's names: a bottleneck strides in its 3x3."""
    level = max_pool2d(relu(convolved(state, images, "conv1", "bn1", stride=2, padding=3)), 3, stride=2, padding=1)
    maps = []
    for layer in range(1, 5):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in state:
            place, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            if bottleneck:
                inner = relu(convolved(state, level, f"{place}.conv1", f"{place}.bn1"))
                inner = relu(convolved(state, inner, f"{place}.conv2", f"{place}.bn2", stride=stride, padding=1))
                inner = convolved(state, inner, f"{place}.conv3", f"{place}.bn3")
            else:
                inner = relu(convolved(state, level, f"{place}.conv1", f"{place}.bn1", stride=stride, padding=1))
                inner = convolved(state, inner, f"{place}.conv2", f"{place}.bn2", padding=1)
            past = level
            if f"{place}.downsample.0.weight" in state:
                past = convolved(state, level, f"{place}.downsample.0", f"{place}.downsample.1", stride=stride)
            level, block = relu(inner + past), block + 1
        maps.append(level)
    return maps


def random_state(kind: str) -> dict[str, Tensor]:
    """Weights of a tiny ResNet of two blocks in its second layer, under torchvision's names."""
    convolutions, widths = (3, (8, 16, 24, 32)) if kind == "bottleneck" else (2, (8, 16, 24, 32))
    state: dict[str, Tensor] = {}
    for name in torchvision_names((1, 2, 1, 1), convolutions, first_shortcut=False):
        place, _, part = name.rpartition(".")
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
            continue
        outer, inner, side = _shape(place, kind, widths)
        if "conv" in place or place.endswith("downsample.0"):
            state[name] = torch.randn(outer, inner, side, side) / (inner * side * side) ** 0.5
        elif part == "running_var":
            state[name] = torch.rand(outer) + 0.5
        else:
            state[name] = torch.randn(outer) * 0.3 + (part == "weight")
    return state


def _shape(place: str, kind: str, widths: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels out and in, and the kernel's side, of the convolution (or of the one before the norm) at a place."""
    if place in {"conv1", "bn1"}:
        return widths[0], 3, 7
    layer, block, part = int(place[5]), int(place.split(".")[1]), place.split(".", 2)[2]
    outer = widths[layer - 1]
    before = outer if block else widths[max(0, layer - 2)]
    if part.startswith("downsample"):
        return outer, before, 1
    number = int(part[-1])
    if kind == "basic":
        return outer, before if number == 1 else outer, 3
    narrow = outer // 4
    return ((narrow, before, 1), (narrow, narrow, 3), (outer, narrow, 1))[number - 1]


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@torch.no_grad()
def test_the_same_maps(kind: str) -> None:
    state, images = random_state(kind), torch.randn(2, 3, 64, 96)
    options = resnet_options(state, "")
    assert options == {
        "depths": [1, 2, 1, 1],
        "layer_type": kind,
        "hidden_sizes": [8, 16, 24, 32],
        "embedding_size": 8,
    }
    theirs = backbone(**options).eval()
    theirs.load_state_dict(to_ours(state, resnet_rows("", "")).state)
    for own, other in zip(
        torchvision_maps(state, images, kind == "bottleneck"), theirs(images).feature_maps, strict=True
    ):
        assert float(other.std()) > 0.1
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_other_networks_are_none() -> None:
    state = random_state("basic")
    assert resnet_options({key: value for key, value in state.items() if not key.startswith("layer4")}, "") is None
    assert resnet_options({key: value for key, value in state.items() if key != "conv1.weight"}, "") is None
