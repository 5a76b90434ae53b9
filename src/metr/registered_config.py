"""EfficientNet-Lite's configuration for transformers, which is read while transformers is half imported."""

from typing import Any

from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

_STAGES = 7


class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Which EfficientNet-Lite: Lite0, or a multiple of it.

    Args:
        width: Multiple of Lite0's channels.
        depth: Multiple of Lite0's blocks.
        freeze_batch_norm: Its batch norms are constants. They are none of PyTorch's then, so that detectors which
            replace those (and would forget EfficientNet's eps) leave them alone.
        out_features: The stages whose maps are given, of "stage1" to "stage7"; or by number in `out_indices`.
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
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, _STAGES + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
