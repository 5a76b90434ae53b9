"""Any backbone that transformers' AutoBackbone knows, hierarchical or a plain vision transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from metr.errors import ConfigError, ModelError, did_you_mean
from metr.hub import built, configuration, loading, pretrained
from metr.models.backbones.base import Backbone, SimplePyramid, freeze_batch_norms
from metr.models.backbones.registered import register
from metr.models.config import BackboneConfig

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BASIC = {"model_type": "resnet", "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
_BOTTLENECK = {"model_type": "resnet", "layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
# The hub name of each, and the configuration that makes it without the hub.
SHORTHANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("microsoft/resnet-18", _BASIC | {"depths": [2, 2, 2, 2]}),
    "resnet34": ("microsoft/resnet-34", _BASIC | {"depths": [3, 4, 6, 3]}),
    "resnet50": ("microsoft/resnet-50", _BOTTLENECK | {"depths": [3, 4, 6, 3]}),
    "resnet101": ("microsoft/resnet-101", _BOTTLENECK | {"depths": [3, 4, 23, 3]}),
}
# Keys of a model's configuration that do not affect its maps, or that are set anew.
_LABELS = {"id2label", "label2id", "num_labels", "problem_type"}
_STAGE_NAMES = {"out_features", "out_indices", "stage_names"}
_ORIGIN = {"architectures", "dtype", "transformers_version"}
_NOT_ARCHITECTURE = _LABELS | _STAGE_NAMES | _ORIGIN
# Side, in pixels, of the image that strides are measured on: a multiple of 32 and of common patches.
_PROBE = 224
_QUARTERS = 4


class HuggingFaceBackbone(Backbone):
    """A backbone of transformers. It freezes the configured stages, and parameters that affect no map.

    Strides and channels are measured on a copy without weights, so nothing is assumed about the architecture.

    Raises:
        ModelError: there is no such model, the hub is out of reach, or it has no map of a wanted stride.
        ConfigError: an option is unknown.
    """

    def __init__(self, config: BackboneConfig) -> None:
        source = _source(config.name)
        architecture = _architecture(config, source)
        survey = _Survey.of(architecture, config)
        architecture.out_features = list(survey.stages)
        pyramid = SimplePyramid(survey.channels[0], survey.strides[0], config.strides) if survey.plain else None
        shape = pyramid or survey
        super().__init__(_rebuilding(config, architecture), shape.channels, shape.strides, _IMAGENET)
        self.network, self.pyramid = _built(config, source, architecture), pyramid
        # Without this padding some networks would cut the image to whole patches.
        self.pad_to = max(survey.strides)
        # With channels last, torch 2.13 crashes in the backward pass of a group norm whose input needs no gradient.
        if any(isinstance(module, nn.GroupNorm) for module in self.network.modules()):
            self.memory_format = torch.contiguous_format
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in survey.idle)
        frozen = _first_stages(self.network, len(architecture.stage_names), config)
        for module in [self.network] if config.freeze_batch_norm else frozen:
            freeze_batch_norms(module)
        self.freeze(frozen)

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """The maps of the wanted stages, or the pyramid made from the last one."""
        maps: tuple[Tensor, ...] = self.network(images).feature_maps
        return maps if self.pyramid is None else self.pyramid(maps[-1])


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """The measurements of an architecture.

    `stages` are the names of the stages whose maps are used, finest first. `plain` says that all stages have the same
    stride, as in a plain vision transformer. `idle` are the parameters that no used map depends on: final norms, mask
    tokens, later stages.
    """

    stages: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    plain: bool
    idle: frozenset[str]

    @staticmethod
    @torch.enable_grad()
    def of(architecture: Any, config: BackboneConfig) -> "_Survey":
        """Measures a copy of the network on the meta device: shapes and gradients, no values."""
        if not hasattr(architecture, "stage_names"):
            what = f"a {architecture.model_type} model is no backbone in transformers"
            raise ModelError(what, where=config.name, hint="name a ResNet, Swin, ConvNeXt, DINOv2 or the like")
        names = list(architecture.stage_names)
        architecture.out_features = names
        with loading(config.name), torch.device("meta"):
            skeleton = built("AutoBackbone", architecture).eval()
            maps = skeleton(torch.empty(1, 3, _PROBE, _PROBE)).feature_maps
        # Of stages with equal strides the last, deepest one is kept.
        found = {_PROBE // level.shape[-1]: (name, level) for name, level in zip(names, maps, strict=True)}
        plain = len(found) == 1
        wanted = tuple(found) if plain else config.strides
        if missing := [stride for stride in wanted if stride not in found]:
            what = f"this {architecture.model_type} has no map of stride {missing[0]}"
            raise ModelError(what, where=config.name, hint=f"backbone.strides of {sorted(found)}")
        stages, levels = zip(*(found[stride] for stride in wanted), strict=True)
        return _Survey(
            stages=stages,
            channels=tuple(int(level.shape[1]) for level in levels),
            strides=wanted,
            plain=plain,
            idle=_idle_parameters(skeleton, levels),
        )


def _idle_parameters(network: nn.Module, maps: Sequence[Tensor]) -> frozenset[str]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients: Any = torch.autograd.grad([level.sum() for level in maps], parameters, allow_unused=True)
    return frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


def _source(name: str) -> str:
    """The folder or hub name."""
    if name in SHORTHANDS:
        return SHORTHANDS[name][0]
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _architecture(config: BackboneConfig, source: str) -> Any:
    """The transformers configuration."""
    options = dict(config.options)
    known = SHORTHANDS[config.name][1] if config.name in SHORTHANDS and not config.pretrained else {}
    model_type = options.pop("model_type", known.get("model_type", config.name))
    made_here = model_type in CONFIG_MAPPING and not config.pretrained
    if not made_here and "/" not in source and not Path(source).is_dir():
        hint = did_you_mean(config.name, ["efficientnet_lite0", *SHORTHANDS])
        raise ModelError(f"no backbone {config.name!r}", where="backbone.name", hint=f"{hint}, or a hub name or folder")
    register()  # a folder may hold METR's own backbone
    with loading(source):
        if made_here:
            _check_options(options, CONFIG_MAPPING[model_type]())
            values = {key: value for key, value in known.items() if key != "model_type"} | options
            return AutoConfig.for_model(model_type, **values)
        architecture = configuration(source, config.revision)
        _check_options(options, architecture)
        for key, value in options.items():
            setattr(architecture, key, value)
        return architecture


def _check_options(options: dict[str, Any], architecture: Any) -> None:
    known = architecture.to_dict()
    for key in options:
        if key not in known:
            what = f"a {architecture.model_type} has no option {key!r}"
            raise ConfigError(what, where="backbone.options", hint=did_you_mean(key, known))


def _rebuilding(config: BackboneConfig, architecture: Any) -> BackboneConfig:
    """The configuration that rebuilds this network with random weights, without the hub."""
    known = type(architecture)().to_dict().keys() - _NOT_ARCHITECTURE
    options = {key: value for key, value in architecture.to_diff_dict().items() if key in known}
    return config.model_copy(update={"pretrained": False, "options": options})


def _built(config: BackboneConfig, source: str, architecture: Any) -> Any:
    with loading(source):
        if not config.pretrained:
            return built("AutoBackbone", architecture)
        # AutoBackbone.from_pretrained would contact the hub even for a folder or a downloaded model.
        network: Any = MODEL_FOR_BACKBONE_MAPPING[type(architecture)]
        revision = config.revision or "main"
        return pretrained(network, source, config=architecture, revision=revision, dtype=torch.float32)


def _first_stages(network: nn.Module, names: int, config: BackboneConfig) -> list[nn.Module]:
    """The modules to freeze: all before the list of stages (or layers), and the first of these."""
    if not config.freeze_stages:
        return []
    # Stage names include the stem, if there is one; the list does not.
    path = next((path for path, part in network.named_modules() if _is_list(part, (names - 1, names))), None)
    if path is None:
        what = "cannot tell this network's stages apart"
        raise ModelError(what, where=config.name, hint="set backbone.freeze_stages=0")
    before: list[nn.Module] = []
    parent = network
    for step in path.split("."):
        children = dict(parent.named_children())
        before += list(children.values())[: list(children).index(step)]
        parent = children[step]
    layers = list(parent.children())
    return before + layers[: round(len(layers) * config.freeze_stages / _QUARTERS)]


def _is_list(part: nn.Module, lengths: tuple[int, int]) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) in lengths
