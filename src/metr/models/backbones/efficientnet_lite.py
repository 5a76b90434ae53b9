"""EfficientNet-Lite (Google, 2020): EfficientNet without squeeze-and-excitation and with ReLU6, made for CPUs."""

import re
from collections.abc import Mapping, Sequence
from math import ceil

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from metr.errors import ConfigError, DependencyError
from metr.hub import efficientnet_lite0_weights
from metr.layers.convolution import fused_convolution, fuses
from metr.models.backbones.base import Backbone, FrozenBatchNorm, freeze_batch_norms
from metr.models.config import BackboneConfig

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Of each stage: blocks, kernel, stride of the first block, expansion, channels."""
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
_EPS = 1e-3
# Index of the last stage of each stride.
_LAST_STAGE = {4: 1, 8: 2, 16: 4, 32: 6}
# Mean and deviation: Google's (x - 127) / 128, for 0..1 instead of 0..255.
_COLOURS = ((127 / 255,) * 3, (128 / 255,) * 3)


def same_convolution(
    features: Float[Tensor, "b c h w"],
    kernel: Float[Tensor, "d _i k k"],
    bias: Float[Tensor, "d"] | None,
    *,
    stride: int,
    groups: int,
    relu6: bool = False,
) -> Float[Tensor, "b d _h _w"]:
    """A convolution with TensorFlow's "same" padding: ceil(h / stride) output rows; extra zeros go to the bottom.

    Where the padding is odd, the kernel gets a leading row of zeros and the image an equal padding on both sides. This
    gives the same result without a padded copy of the image.
    """
    kernel, padding = _even(kernel, features.shape[-2:], stride)
    if fuses(features, kernel):
        return fused_convolution(features, kernel, bias, stride=stride, padding=padding, groups=groups, relu6=relu6)
    convolved = conv2d(features, kernel, bias, stride, padding, 1, groups)
    return nn.functional.relu6(convolved, inplace=True) if relu6 else convolved


def _even(
    kernel: Float[Tensor, "d _i k k"], sides: Sequence[int], stride: int
) -> tuple[Float[Tensor, "d _i _rows _columns"], tuple[int, int]]:
    """A kernel and the equal paddings of both sides with which it gives "same" padding of `sides` (height, width)."""
    size = kernel.shape[-1]
    total = [max((ceil(side / stride) - 1) * stride + size - side, 0) for side in sides]
    odd_rows, odd_columns = (padding % 2 for padding in total)
    if odd_rows or odd_columns:
        kernel = pad(kernel, (odd_columns, 0, odd_rows, 0))
    return kernel, ((total[0] + 1) // 2, (total[1] + 1) // 2)


class ConvNorm(nn.Module):
    """Convolution, batch norm and, if `activate`, ReLU6. A frozen norm is folded into the convolution."""

    def __init__(
        self, inner: int, outer: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.stride, self.groups, self.activate = stride, groups, activate
        self.convolution = nn.Conv2d(inner, outer, kernel, stride, groups=groups, bias=False)
        self.normalization: nn.Module = nn.BatchNorm2d(outer, eps=_EPS, momentum=0.01)
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out")

    def forward(self, features: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b _d _h _w"]:
        """Features of ceil(h / stride) x ceil(w / stride) cells."""
        kernel, bias, norm = self.convolution.weight, None, self.normalization
        frozen = isinstance(norm, FrozenBatchNorm)
        if isinstance(norm, FrozenBatchNorm):
            kernel, bias = norm.fold(kernel)
        features = same_convolution(
            features, kernel, bias, stride=self.stride, groups=self.groups, relu6=self.activate and frozen
        )
        if frozen:
            return features
        features = norm(features)
        return nn.functional.relu6(features, inplace=True) if self.activate else features


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project (Sandler et al., 2018)."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inner * expansion
        self.expand = ConvNorm(inner, width) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride=stride, groups=width)
        self.project = ConvNorm(width, outer, activate=False)
        self.residual = stride == 1 and inner == outer

    def forward(self, features: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b _d _h _w"]:
        """Features of ceil(h / stride) x ceil(w / stride) cells."""
        changed: Tensor = self.project(self.depthwise(self.expand(features)))
        return features + changed if self.residual else changed


class EfficientNetLite(nn.Module):
    """Stem and seven stages; the strides at their ends are 2, 4, 8, 16, 16, 32 and 32.

    Args:
        width: Multiplies the channels of the stages.
        depth: Multiplies the blocks of all stages but the first and the last. Lite0 is (1, 1), Lite1 (1, 1.1), Lite2
            (1.1, 1.2), Lite3 (1.2, 1.4), Lite4 (1.4, 1.8).
        stages: How many stages to build.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0, stages: int = len(STAGES)) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _STEM, 3, stride=2)
        self.stages = nn.ModuleList()
        channels = [_STEM]
        for index, (blocks, kernel, stride, expansion, outer) in enumerate(STAGES[:stages]):
            if 0 < index < len(STAGES) - 1:
                blocks = ceil(blocks * depth)  # noqa: PLW2901
            channels.append(_rounded(outer * width))
            steps = [(channels[-2], stride), *[(channels[-1], 1)] * (blocks - 1)]
            self.stages.append(
                nn.Sequential(*(InvertedResidual(i, channels[-1], kernel, s, expansion) for i, s in steps))
            )
        self.channels = tuple(channels[1:])

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _c _h _w"], ...]:
        """The output of each stage for normalised images."""
        features, maps = self.stem(images), []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return tuple(maps)


class EfficientNetLiteClassifier(nn.Module):
    """EfficientNet-Lite with its ImageNet head; images as `EfficientNetLiteBackbone` takes them."""

    def __init__(self, width: float = 1.0, depth: float = 1.0, classes: int = _CLASSES) -> None:
        super().__init__()
        self.trunk = EfficientNetLite(width, depth)
        self.head = ConvNorm(self.trunk.channels[-1], _HEAD)
        self.classifier = nn.Linear(_HEAD, classes)

    @classmethod
    def packaged(cls) -> "EfficientNetLiteClassifier":
        """EfficientNet-Lite0 with its packaged weights, in evaluation mode.

        Raises:
            DependencyError: the package of the weights is missing or altered.
        """
        classifier = cls()
        own = ("head", "classifier")
        weights = packaged_weights().items()
        classifier.load_state_dict({key if key.startswith(own) else f"trunk.{key}": value for key, value in weights})
        return classifier.eval()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b _classes"]:
        """One logit a class, of RGB images in 0..1."""
        mean, std = (images.new_tensor(colour)[:, None, None] for colour in _COLOURS)
        features = self.head(self.trunk((images - mean) / std)[-1])
        logits: Tensor = self.classifier(reduce(features, "b c h w -> b c", "mean"))
        return logits


class EfficientNetLiteBackbone(Backbone):
    """EfficientNet-Lite0 (or a scaled version) for detection.

    Raises:
        ConfigError: an option is unknown, or the network of these options has no pretrained weights.
        DependencyError: the package of the pretrained weights is missing or altered.
    """

    def __init__(self, config: BackboneConfig) -> None:
        multiples = _multiples(config)
        last = [_LAST_STAGE[stride] for stride in config.strides]
        trunk = EfficientNetLite(**multiples, stages=last[-1] + 1)
        rebuilt = config.model_copy(update={"pretrained": False})
        super().__init__(rebuilt, [trunk.channels[stage] for stage in last], config.strides, _COLOURS)
        if config.pretrained:
            weights = packaged_weights()
            trunk.load_state_dict({key: weights[key] for key in trunk.state_dict()})
        self.trunk, self._last = trunk, last
        frozen = self._first_stages(config.freeze_stages)
        for module in [trunk] if config.freeze_batch_norm else frozen:
            freeze_batch_norms(module)
        self.freeze(frozen)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The last map of each wanted stride."""
        maps = self.trunk(images)
        return tuple(maps[stage] for stage in self._last)

    @property
    def pretrained_part(self) -> nn.Module:
        """All of it."""
        return self.trunk

    def _first_stages(self, number: int) -> list[nn.Module]:
        if not number:
            return []
        ends = sorted(_LAST_STAGE.values())
        return [self.trunk.stem, *self.trunk.stages[: ends[number - 1] + 1]]


def packaged_weights() -> dict[str, Tensor]:
    """The packaged ImageNet weights of EfficientNet-Lite0, under the keys of `EfficientNetLiteClassifier`."""
    path = efficientnet_lite0_weights()
    weights: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    try:
        return {_renamed(key): value for key, value in weights.items()}
    except (KeyError, IndexError) as error:
        raise DependencyError(f"unexpected weight {error}", where=path) from None


def _renamed(key: str) -> str:
    """Our key of a packaged weight, such as `_blocks.4._bn1.bias`."""
    block = re.fullmatch(r"_blocks\.(\d+)\._(\w+?)\.(\w+)", key)
    if block:
        stage, place = _PLACES[int(block[1])]
        return f"stages.{stage}.{place}.{_PARTS[block[2]]}.{block[3]}"
    part, _, kind = key.rpartition(".")
    return f"{_OUTER[part]}.{kind}"


_PLACES = [(stage, place) for stage, (blocks, *_) in enumerate(STAGES) for place in range(blocks)]
_PARTS = {
    "expand_conv": "expand.convolution",
    "bn0": "expand.normalization",
    "depthwise_conv": "depthwise.convolution",
    "bn1": "depthwise.normalization",
    "project_conv": "project.convolution",
    "bn2": "project.normalization",
}
_OUTER = {
    "_conv_stem": "stem.convolution",
    "_bn0": "stem.normalization",
    "_conv_head": "head.convolution",
    "_bn1": "head.normalization",
    "_fc": "classifier",
}


def _multiples(config: BackboneConfig) -> dict[str, float]:
    unknown = sorted(config.options.keys() - {"width", "depth"})
    if unknown:
        what = f"{config.name} has no option {unknown[0]!r}"
        raise ConfigError(what, where="backbone.options", hint="width and depth multiply channels and blocks")
    multiples = {key: float(value) for key, value in config.options.items()}
    if config.pretrained and any(value != 1.0 for value in multiples.values()):
        what = "there are pretrained weights for width 1 and depth 1 only"
        raise ConfigError(what, where="backbone.options", hint="set backbone.pretrained=false")
    return multiples


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and at least 0.9 `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


STAGE_OF_STRIDE = {4: "stage2", 8: "stage3", 16: "stage5", 32: "stage7"}
"""The last stage of each stride."""
