"""RF-DETR (Robinson et al., 2025): LW-DETR on a DINOv2 that attends inside windows, with layer norms and one level."""

from dataclasses import replace
from typing import Any

from metr.conversion.table import State, backbone_rows
from metr.conversion.targets import lw_detr
from metr.conversion.targets.base import Adopted, BuildSpec, KeyTable
from metr.errors import ModelError
from metr.models.config import BackboneConfig, DetectorConfig


def configure(spec: BuildSpec) -> Any:
    """An RfDetrConfig.

    Raises:
        ModelError: METR has another backbone, or other levels than one of the backbone's stride.
    """
    from transformers import RfDetrConfig

    encoder = lw_detr.projector_of(spec)
    if encoder.scales != (1.0,):
        what = f"RF-DETR has one level of scale 1 in transformers, this METR has levels of {list(encoder.scales)}"
        raise ModelError(what, where="model.encoder.scales", hint="train with model.encoder.scales=[1]")
    values = lw_detr.arguments(spec, TARGET.title, "rf_detr_dinov2")
    return RfDetrConfig(layer_norm_eps=encoder.norm_eps, num_feature_levels=1, **values)


def table(config: Any, metr: DetectorConfig) -> KeyTable:
    """RF-DETR's; of Group DETR's groups the first, which alone detects."""
    return KeyTable(
        backbone=backbone_rows(config.backbone_config, TARGET.backbone),
        encoder=lw_detr.projector_rows("model.backbone.projector", "encoder.scales.0"),
        decoder=lw_detr.decoder_rows(),
        heads=lw_detr.head_rows(metr),
    )


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What RF-DETR computes otherwise."""
    said = lw_detr.projector_differences(config)
    if config.encoder.norm != "layer":
        said += ("its projector has layer norms; this METR's batch norms, whose scales alone move",)
    return said


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR with RF-DETR's projector, and its decoder.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    encoder = {"scales": (1.0,), "norm": "layer", "norm_eps": config.layer_norm_eps}
    return lw_detr.adopted(config, backbone, state, encoder)


TARGET = replace(
    lw_detr.TARGET,
    name="rf_detr",
    title="RF-DETR",
    configure=configure,
    table=table,
    differences=differences,
    adopt=adopt,
    # transformers 5.23.0 mixes up rows and columns of windows where an image is not square
    square=True,
)
