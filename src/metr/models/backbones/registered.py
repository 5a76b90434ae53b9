"""EfficientNet-Lite as a backbone of transformers: for detectors of transformers that METR hands weights to."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from metr.models.backbones.base import freeze_batch_norms
from metr.models.backbones.efficientnet_lite import STAGES, EfficientNetLite, packaged_weights

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteModel", "register"]


class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Which EfficientNet-Lite: Lite0, or a scaled version.

    Args:
        width: Multiple of Lite0's channels.
        depth: Multiple of Lite0's blocks.
        freeze_batch_norm: Makes batch norms constant. They are then no `nn.BatchNorm2d`, so detectors that
            replace these (and would lose EfficientNet's eps) leave them alone.
        out_features: The stages whose maps are returned, of "stage1" to "stage7"; or by number in `out_indices`.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self,
        width: float = 1.0,
        depth: float = 1.0,
        freeze_batch_norm: bool = True,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.width, self.depth, self.freeze_batch_norm = width, depth, freeze_batch_norm
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(STAGES) + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


class EfficientNetLiteModel(BackboneMixin, PreTrainedModel):  # type: ignore[no-untyped-call]
    """EfficientNet-Lite for `AutoBackbone`; images are normalised as (x - 127) / 128, of 0 to 255."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._wanted = [config.stage_names.index(name) for name in config.out_features]
        self.trunk = EfficientNetLite(config.width, config.depth, stages=max(self._wanted))
        missing = len(config.stage_names) - 1 - len(self.trunk.channels)
        self.num_features = [0, *self.trunk.channels, *[0] * missing]
        if config.freeze_batch_norm:
            freeze_batch_norms(self.trunk)
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises weights that a file lacks, as the layers themselves do."""
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out")

    @torch.no_grad()
    def load_imagenet(self) -> None:
        """Loads the packaged ImageNet weights, from which a METR starts too.

        Raises:
            DependencyError: the package of the weights is missing or altered.
        """
        weights = packaged_weights()
        self.trunk.load_state_dict({key: weights[key] for key in self.trunk.state_dict()})

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:  # type: ignore[override]
        """The maps [b c h w] of the wanted stages, finest first."""
        maps = self.trunk(pixel_values)
        return BackboneOutput(feature_maps=tuple(maps[stage - 1] for stage in self._wanted))


def register() -> None:
    """Makes EfficientNet-Lite known to transformers' `AutoConfig` and `AutoBackbone`.

    Call it before transformers loads a detector that has this backbone, such as a folder that `metr transfer` wrote.
    Calling it again does nothing.
    """
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
