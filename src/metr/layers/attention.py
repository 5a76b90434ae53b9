"""Multi-head attention with separate projections, plain and conditional, on PyTorch's fused kernel."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from metr.layers.groups import QueryGroups, attend_in_groups


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017).

    Args:
        width: Size of a token, divisible by `heads`.
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
        allowed: Bool[Tensor, "b #q s"] | QueryGroups | None = None,
    ) -> Float[Tensor, "b q d"]:
        """The attention output for each query. `allowed` says which keys it attends to; None means all."""
        return self.gather(query, self.key(key), self.value(value), allowed)

    def gather(
        self,
        query: Float[Tensor, "b q d"],
        keys: Float[Tensor, "b s d"],
        values: Float[Tensor, "b s d"],
        allowed: Bool[Tensor, "b #q s"] | QueryGroups | None = None,
    ) -> Float[Tensor, "b q d"]:
        """`forward` with keys and values that are already projected."""
        queries, keys, values = (
            rearrange(projected, "b n (heads c) -> b heads n c", heads=self.heads)
            for projected in (self.query(query), keys, values)
        )
        gathered = attend(queries, keys, values, allowed)
        out: Tensor = self.out(rearrange(gathered, "b heads n c -> b n (heads c)"))
        return out


def attend(
    queries: Float[Tensor, "b heads q c"],
    keys: Float[Tensor, "b heads s c"],
    values: Float[Tensor, "b heads s e"],
    allowed: Bool[Tensor, "b #q s"] | QueryGroups | None,
) -> Float[Tensor, "b heads q e"]:
    """Fused attention. On CPUs autocast is off: their backward pass is faster in float32 than in bfloat16."""
    if isinstance(allowed, QueryGroups):
        if allowed.layout is not None:
            return attend_in_groups(queries, keys, values, allowed.layout)
        allowed = allowed.mask
    mask = None if allowed is None else allowed.unsqueeze(1)
    if queries.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(queries.float(), keys.float(), values.float(), attn_mask=mask)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


class PlacedSelfAttention(nn.Module):
    """Self-attention whose queries and keys are the sum of a projected content and a projected position.

    Args:
        width: Size of a token, divisible by `heads`.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_content, self.query_position = nn.Linear(width, width), nn.Linear(width, width)
        self.key_content, self.key_position = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        _start_projections(self)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        allowed: Bool[Tensor, "b #q q"] | QueryGroups | None = None,
    ) -> Float[Tensor, "b q d"]:
        """The attention output for each token. `allowed` says to which tokens it attends; None means all."""
        queries = self.query_content(content) + self.query_position(position)
        keys = self.key_content(content) + self.key_position(position)
        queries, keys, values = (_heads(part, self.heads) for part in (queries, keys, self.value(content)))
        gathered = attend(queries, keys, values, allowed)
        out: Tensor = self.out(rearrange(gathered, "b heads q c -> b q (heads c)"))
        return out


class ConditionalAttention(nn.Module):
    """Cross-attention that compares contents and places separately (Conditional DETR, Meng et al., 2021).

    The query of a head is its part of the content followed by its part of the encoded place, and so is the key. Their
    dot product is the sum of a similarity of contents and a similarity of places.

    Args:
        width: Size of a token, divisible by `heads`.
        heads: Attention heads.
        joins_position: Add the positions to the contents too, for a first layer whose content says nothing of places.
    """

    def __init__(self, width: int, heads: int, joins_position: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query_content, self.query_place = nn.Linear(width, width), nn.Linear(width, width)
        self.key_content, self.key_place = nn.Linear(width, width), nn.Linear(width, width)
        self.query_position = nn.Linear(width, width) if joins_position else None
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        _start_projections(self)
        # Encoded places are compared unchanged at the start: a query attends to where it is.
        for projection in (self.query_place, self.key_place):
            nn.init.eye_(projection.weight)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        place: Float[Tensor, "b q d"],
        tokens: Float[Tensor, "b s d"],
        token_places: Float[Tensor, "b s d"],
        allowed: Bool[Tensor, "b #q s"],
    ) -> Float[Tensor, "b q d"]:
        """The attention output for each query.

        Args:
            content: Contents of the queries.
            position: Their learnt position embeddings, used only with `joins_position`.
            place: Their encoded places, in the same encoding as `token_places`.
            tokens: The memory.
            token_places: The encoded places of its tokens.
            allowed: Which tokens each query attends to.
        """
        queries, keys, where = self.query_content(content), self.key_content(tokens), self.key_place(token_places)
        if self.query_position is not None:
            queries, keys = queries + self.query_position(position), keys + where
        queries = self._beside(queries, self.query_place(place))
        keys = self._beside(keys, where)
        gathered = self.attended(queries, keys, _heads(self.value(tokens), self.heads), allowed)
        out: Tensor = self.out(rearrange(gathered, "b heads q c -> b q (heads c)"))
        return out

    def attended(
        self,
        queries: Float[Tensor, "b heads q c"],
        keys: Float[Tensor, "b heads s c"],
        values: Float[Tensor, "b heads s e"],
        allowed: Bool[Tensor, "b #q s"],
    ) -> Float[Tensor, "b heads q e"]:
        """The weighted sums of the values, head by head."""
        return attend(queries, keys, values, allowed)

    def _beside(self, content: Tensor, place: Tensor) -> Tensor:
        """Each head's parts of the content and of the place, concatenated."""
        return torch.cat([_heads(content, self.heads), _heads(place, self.heads)], dim=-1)


def _start_projections(module: nn.Module) -> None:
    """Initialises as `Attention` does: Glorot weights except for the output layer, and biases of zero."""
    for name, linear in module.named_children():
        if isinstance(linear, nn.Linear):
            nn.init.zeros_(linear.bias)
            if name != "out":
                nn.init.xavier_uniform_(linear.weight)


def _heads(tokens: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b heads n c"]:
    return rearrange(tokens, "b n (heads c) -> b heads n c", heads=heads)
