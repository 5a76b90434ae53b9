"""RT-DETRv2 (Lv et al., 2024): RT-DETR with another way to write the same sampling."""

from dataclasses import replace
from typing import Any

from metr.conversion.targets import rt_detr
from metr.conversion.targets.base import Order


def configure(order: Order) -> Any:
    """An RTDetrV2Config."""
    from transformers import RTDetrV2Config

    return RTDetrV2Config(**rt_detr.arguments(order), decoder_n_levels=len(order.channels))


TARGET = replace(rt_detr.TARGET, name="rt_detr_v2", title="RT-DETRv2", configure=configure)
