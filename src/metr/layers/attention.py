"""Multi-head attention with separate projections, on PyTorch's fused kernel."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017).

    Args:
        width: Numbers a token, divisible by `heads`.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        for projection in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        key: Float[Tensor, "b s d"],
        value: Float[Tensor, "b s d"],
        allowed: Bool[Tensor, "b #q s"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """What each query gathers from the values whose keys it may look at (`allowed`; None means all)."""
        return self.gather(query, self.key(key), self.value(value), allowed)

    def gather(
        self,
        query: Float[Tensor, "b q d"],
        keys: Float[Tensor, "b s d"],
        values: Float[Tensor, "b s d"],
        allowed: Bool[Tensor, "b #q s"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """`forward` with keys and values that are projected already."""
        queries, keys, values = (
            rearrange(projected, "b n (heads c) -> b heads n c", heads=self.heads)
            for projected in (self.query(query), keys, values)
        )
        mask = None if allowed is None else allowed.unsqueeze(1)
        gathered = attend(queries, keys, values, mask)
        out: Tensor = self.out(rearrange(gathered, "b heads n c -> b n (heads c)"))
        return out


def attend(
    queries: Float[Tensor, "b heads q c"],
    keys: Float[Tensor, "b heads s c"],
    values: Float[Tensor, "b heads s e"],
    mask: Bool[Tensor, "b 1 #q s"] | None,
) -> Float[Tensor, "b heads q e"]:
    """The fused kernel. CPUs differentiate it faster in float32 than in bfloat16: autocast has no say there."""
    if queries.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(queries.float(), keys.float(), values.float(), attn_mask=mask)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
