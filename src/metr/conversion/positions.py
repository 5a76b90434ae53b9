"""How METR's queries are placed: the function that turns a box into a query's position."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metr.layers.position_encoding import box_encoding
from metr.models.detector import Detector


def box_position(network: Detector) -> Callable[[Tensor], Tensor] | None:
    """From cxcywh boxes [n 4] to positions [n d]; None where a network takes the four numbers as they are."""
    if network.config.decoder.positions == "plain":
        return None
    width, position = network.config.width, network.decoder.position
    return lambda boxes: position(box_encoding(boxes, width))


def four_encodings(boxes: Float[Tensor, "n 4"], width: int) -> Float[Tensor, "n c"]:
    """As METR encodes boxes, with x before y: Deformable DETR's order."""
    y, x, w, h = box_encoding(boxes, width).chunk(4, dim=-1)
    return rearrange(torch.stack([x, y, w, h], dim=1), "n four c -> n (four c)")
