"""Multi-scale deformable attention (Zhu et al., 2021) in plain PyTorch: nothing to compile, any device."""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.layers.sampling import LevelShapes, sample_levels


class DeformableAttention(nn.Module):
    """Each query looks at a few learnt points around its reference, on every level.

    Args:
        width: Numbers a token, divisible by `heads`.
        heads: Attention heads.
        levels: Levels of the memory.
        points: Points a head and level.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self._start_as_a_star()

    def _start_as_a_star(self) -> None:
        """Each head starts by looking in a direction of its own, its points at growing distance."""
        nn.init.zeros_(self.offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1)
        star = torch.einsum("hx,p->hpx", direction, distance.float())
        with torch.no_grad():
            self.offsets.bias.copy_(star.unsqueeze(1).expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l xywh"],
        tokens: Float[Tensor, "b s d"],
        padding_mask: Bool[Tensor, "b s"],
        level_shapes: LevelShapes,
    ) -> Float[Tensor, "b q d"]:
        """What each query gathers from the tokens.

        Args:
            query: Content and position of the queries.
            reference: Points (x, y) or boxes (cx, cy, w, h) for each level, in 0..1 of the padded level. Offsets are
                in cells around a point, and in half sizes / `points` around a box.
            tokens: The memory, finest level first, row by row.
            padding_mask: True where a token is padding; there the values are zero.
            level_shapes: (height, width) of each level.
        """
        return self.gather(query, reference, self.values(tokens, padding_mask), level_shapes)

    def values(self, tokens: Float[Tensor, "b s d"], padding_mask: Bool[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """The tokens' projected values, zero on padding."""
        values: Tensor = self.value(tokens)
        return values.masked_fill(padding_mask.unsqueeze(-1), 0.0)

    def gather(
        self,
        query: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l xywh"],
        value: Float[Tensor, "b s d"],
        level_shapes: LevelShapes,
    ) -> Float[Tensor, "b q d"]:
        """`forward` with `values` that are there already."""
        offsets = rearrange(self.offsets(query), "b q (m l p x) -> b q m l p x", m=self.heads, l=self.levels, x=2)
        weights = rearrange(self.weights(query), "b q (m n) -> b q m n", m=self.heads).softmax(-1)
        weights = rearrange(weights, "b q m (l p) -> b q m l p", l=self.levels)
        places = self._places(offsets, reference, level_shapes)
        gathered: Tensor = self.out(sample_levels(value, places, weights, level_shapes))
        return gathered

    def _places(self, offsets: Tensor, reference: Tensor, level_shapes: LevelShapes) -> Tensor:
        """Sampling places [b q m l p 2] in 0..1 of each padded level, in float32 whatever the precision around."""
        reference = rearrange(reference.float(), "b q l x -> b q 1 l 1 x")
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / self.points))
        sizes = reference.new_tensor([(w, h) for h, w in level_shapes])
        return reference + offsets / sizes[:, None]
