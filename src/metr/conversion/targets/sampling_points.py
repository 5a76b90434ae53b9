"""Points that a decoder samples from the memory, where METR's are not theirs bit by bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metr.conversion.targets.base import Derived, level_points

# of a box's sides, what an offset is measured in: METR's, and theirs where nothing else is set
_SCALE = 0.5
# a logit that leaves a point no weight beside any other, and that float16 holds
_NEVER = -1e4


def even_sampling(config: Any, state: Mapping[str, Tensor]) -> dict[str, Derived]:
    """Offsets and weights of the decoder's attention to the memory, where METR's are not theirs bit by bit.

    METR has as many points on every level: levels with fewer get points that weigh nothing. Both divide a level's
    offsets by its number of points, so that with more points the same places take larger offsets; another scale of
    the offsets goes into them too.

    Args:
        config: Theirs.
        state: Their weights.
    """
    points, scale = level_points(config), config.to_dict().get("decoder_offset_scale", _SCALE)
    most = max(points)
    if min(points) == most and scale == _SCALE:
        return {}
    stretched = [most / number * scale / _SCALE for number in points]
    how = f"padded to {most} points a level" if min(points) < most else f"offsets of scale {scale:g}"
    derived: dict[str, Derived] = {}
    for layer in range(config.decoder_layers):
        theirs, ours = f"model.decoder.layers.{layer}.encoder_attn", f"decoder.layers.{layer}.cross"
        for part in ("weight", "bias"):
            offsets, weights = f"{theirs}.sampling_offsets.{part}", f"{theirs}.attention_weights.{part}"
            heads = config.decoder_attention_heads
            moved = _padded(state[offsets], heads, points, stretched)
            derived[f"{ours}.offsets.{part}"] = Derived(tensor=moved, how=how, source=(offsets,))
            moved = _padded(state[weights], heads, points, [1.0] * len(points), 0.0 if part == "weight" else _NEVER)
            derived[f"{ours}.weights.{part}"] = Derived(tensor=moved, how=how, source=(weights,))
    return derived


def _padded(
    rows: Float[Tensor, "r *n"], heads: int, points: Sequence[int], factors: Sequence[float], fill: float = 0.0
) -> Float[Tensor, "s *n"]:
    """Rows of a linear layer, head by head and point by point, with as many points on every level.

    Args:
        rows: Theirs; each point has one or two.
        heads: Attention heads.
        points: Of each level, theirs.
        factors: By which each level's rows are multiplied.
        fill: What the rows of added points hold.
    """
    by_point = rows.reshape(heads, sum(points), -1, *rows.shape[1:])
    levels = []
    for level, factor in zip(by_point.split_with_sizes(list(points), dim=1), factors, strict=True):
        whole = level.new_full((heads, max(points), *level.shape[2:]), fill)
        whole[:, : level.shape[1]] = level * factor
        levels.append(whole)
    return torch.stack(levels, dim=1).flatten(0, 3)
