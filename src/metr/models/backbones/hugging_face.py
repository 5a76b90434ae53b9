"""Any backbone that transformers' AutoBackbone knows, hierarchical or a plain vision transformer."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from metr.errors import ConfigError, ModelError, did_you_mean
from metr.hub import built, configuration, loading, pretrained
from metr.models.backbones.base import Backbone, SimplePyramid, SpatialAdapter, freeze_batch_norms
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
# Vision transformers that attend inside windows: the option that says how many windows a side of the image has.
WINDOWED = {"lw_detr_vit": "num_windows_side", "rf_detr_dinov2": "num_windows"}
# Those that mix up rows and columns where an image is not square: transformers 5.23.0 divides rows into as many cells
# as columns have, and columns into as many as rows have.
_SQUARE_WINDOWS = frozenset({"rf_detr_dinov2"})
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
        wants_pyramid = survey.plain and not config.layers
        pyramid = SimplePyramid(survey.channels[0], survey.strides[0], config.strides) if wants_pyramid else None
        adapter = _adapter(config, survey) if config.adapter else None
        shape = pyramid or adapter or survey
        super().__init__(_rebuilding(config, architecture), shape.channels, shape.strides, _IMAGENET)
        self.network, self.pyramid, self.adapter = _built(config, source, architecture), pyramid, adapter
        # Without this padding some networks would cut the image to whole patches, or fail at windows of unequal sizes.
        self.pad_to = max(survey.strides if adapter is None else adapter.strides) * _windows(architecture)
        self.multiple = self.pad_to if config.layers else self.multiple
        self.pads_to_square = architecture.model_type in _SQUARE_WINDOWS and _windows(architecture) > 1
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
        """The maps of the wanted stages, joined with the adapter's, or the pyramid made from the last one."""
        maps: tuple[Tensor, ...] = self.network(images).feature_maps
        if self.adapter is not None:
            return self.adapter(images, maps)  # type: ignore[no-any-return]
        return maps if self.pyramid is None else self.pyramid(maps[-1])

    @property
    def pretrained_part(self) -> nn.Module:
        """The network of transformers, without pyramid and adapter."""
        part: nn.Module = self.network
        return part


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
        with loading(config.name):
            skeleton, maps, strides = _probed(architecture)
        plain = len(set(strides.values())) == 1
        stages = _layers(strides, config) if config.layers else _stages(strides, config)
        levels = [maps[names.index(stage)] for stage in stages]
        return _Survey(
            stages=stages,
            channels=tuple(int(level.shape[1]) for level in levels),
            strides=tuple(strides[stage] for stage in stages),
            plain=plain,
            idle=_idle_parameters(skeleton, levels),
        )


def _probed(architecture: Any) -> tuple[nn.Module, Sequence[Tensor], dict[str, int]]:
    """The network of an architecture without weights, its maps of all stages, and their strides."""
    windows = _windows(architecture)
    side = _PROBE if windows == 1 else architecture.patch_size * windows
    with torch.device("meta"):
        skeleton = _initialised(architecture).eval()
        maps = skeleton(torch.empty(1, 3, side, side)).feature_maps
    names = architecture.out_features
    return skeleton, maps, dict(zip(names, (side // int(level.shape[-1]) for level in maps), strict=True))


def strides_of(architecture: Any, called: str) -> tuple[int, ...] | None:
    """Pixels a cell of the maps that a configuration of transformers' backbones gives, in their order.

    None for a plain vision transformer, all of whose maps have one stride.

    Args:
        architecture: The configuration.
        called: What it comes from, for messages.

    Raises:
        ModelError: it cannot be built, or a map is not the deepest one of its stride, which METR would read.
    """
    every = deepcopy(architecture)
    every.out_features = list(every.stage_names)
    with loading(called):
        _, _, strides = _probed(every)
    if len(set(strides.values())) == 1:
        return None
    deepest = {stride: stage for stage, stride in strides.items()}
    wanted = list(architecture.out_features)
    if other := [stage for stage in wanted if deepest[strides[stage]] != stage]:
        what = f"reads {other[0]}; of the maps with {strides[other[0]]} pixels a cell METR reads the deepest one"
        raise ModelError(what, where=called, hint=f"one that reads {deepest[strides[other[0]]]}")
    return tuple(strides[stage] for stage in wanted)


def _stages(strides: dict[str, int], config: BackboneConfig) -> tuple[str, ...]:
    """The stages of the wanted strides; the last one where all strides are equal."""
    # Of stages with equal strides the last, deepest one is kept.
    found = {stride: stage for stage, stride in strides.items()}
    if len(found) == 1:
        return (*found.values(),)
    if missing := [stride for stride in config.strides if stride not in found]:
        what = f"it has no map of stride {missing[0]}"
        raise ModelError(what, where=config.name, hint=f"backbone.strides of {sorted(found)}")
    return tuple(found[stride] for stride in config.strides)


def _layers(strides: dict[str, int], config: BackboneConfig) -> tuple[str, ...]:
    """The stages after the wanted layers of a plain vision transformer."""
    if len(set(strides.values())) > 1:
        what = "backbone.layers is for plain vision transformers, whose maps all have one stride"
        raise ModelError(what, where=config.name, hint=f"backbone.strides of {sorted(set(strides.values()))}")
    stages = [stage for stage in strides if stage != "stem"]
    if config.layers[-1] > len(stages):
        what = f"it has {len(stages)} layers, and backbone.layers asks for number {config.layers[-1]}"
        raise ModelError(what, where=config.name, hint="such as a quarter, half, three quarters and all of them")
    return tuple(stages[layer - 1] for layer in config.layers)


def _adapter(config: BackboneConfig, survey: _Survey) -> SpatialAdapter:
    """The adapter for the maps of a vision transformer.

    Raises:
        ModelError: its patches are not those that the adapter's maps fit.
    """
    middle = SpatialAdapter.strides[1]
    if survey.strides[0] != middle:
        what = f"backbone.adapter needs patches of {middle} pixels, found {survey.strides[0]}"
        raise ModelError(what, where=config.name, hint="such as those of DINOv3, or backbone.adapter=0")
    return SpatialAdapter(config.adapter, survey.channels)


def _windows(architecture: Any) -> int:
    """How many windows a side of the image is divided into."""
    return int(getattr(architecture, WINDOWED.get(architecture.model_type, ""), 1))


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
            return AutoConfig.for_model(model_type, **_with_layers(model_type, values, config))
        architecture = configuration(source, config.revision)
        if model_type in WINDOWED and model_type != architecture.model_type:
            architecture = _windowed(model_type, architecture, options, config)
        _check_options(options, architecture)
        for key, value in options.items():
            setattr(architecture, key, value)
        return architecture


def _with_layers(model_type: str, values: dict[str, Any], config: BackboneConfig) -> dict[str, Any]:
    """Values for a configuration. RF-DETR's backbone decides by the wanted layers which layers attend globally."""
    if model_type not in WINDOWED or not config.layers:
        return values
    depth = values.get("num_hidden_layers", CONFIG_MAPPING[model_type]().num_hidden_layers)
    return {"out_indices": [layer for layer in config.layers if layer <= depth]} | values


def _windowed(model_type: str, architecture: Any, options: dict[str, Any], config: BackboneConfig) -> Any:
    """The configuration of a vision transformer, as that of one with the same weights that attends inside windows."""
    known = CONFIG_MAPPING[model_type]().to_dict().keys() - _NOT_ARCHITECTURE - {"model_type"}
    values = {key: value for key, value in architecture.to_dict().items() if key in known} | options
    return AutoConfig.for_model(model_type, **_with_layers(model_type, values, config))


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
            return _initialised(architecture)
        # AutoBackbone.from_pretrained would contact the hub even for a folder or a downloaded model.
        revision = config.revision or "main"
        stored = architecture if architecture.model_type not in WINDOWED else configuration(source, config.revision)
        same = stored.model_type == architecture.model_type
        kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(stored)]
        loaded = pretrained(
            kind, source, config=architecture if same else stored, revision=revision, dtype=torch.float32
        )
        if same:
            return loaded
        # Read as RF-DETR's backbone, transformers 5.23.0 would not know a DINOv2's keys and leave its attention random.
        network = _initialised(architecture)
        network.load_state_dict(loaded.state_dict())
        return network


def _initialised(architecture: Any) -> Any:
    """The network with random weights, all of it on the default device.

    LW-DETR's backbone in transformers 5.23.0 makes some of its parameters on the CPU wherever it is built.
    """
    return built("AutoBackbone", architecture).to(torch.get_default_device())


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
