"""The decoders: queries attend to their group and to the image, and refine their boxes layer by layer.

`Decoder` samples a few places of every level of the memory (Deformable DETR, DINO). `ConditionalDecoder` attends to the
whole memory, near the box of the query (DAB-DETR).
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.layers.attention import Attention, ConditionalAttention, PlacedSelfAttention
from metr.layers.deformable_attention import DeformableAttention
from metr.layers.groups import QueryGroups, query_groups
from metr.layers.mlp import MLP, FeedForward, activation_named, unit_scale
from metr.layers.position_encoding import box_encoding
from metr.models.config import DecoderConfig, SimilarityConfig
from metr.models.encoders.pyramid import token_places
from metr.models.heads import BoxHead, build_class_head
from metr.structures import Decoded, Memory, Queries, gather_rows


class DecoderLayer(nn.Module):
    """Self-attention inside each group, deformable cross-attention to the memory, feed-forward."""

    def __init__(self, width: int, levels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads)
        self.among_norm = nn.LayerNorm(width)
        self.cross = DeformableAttention(width, config.cross_heads or config.heads, levels, config.points)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l xywh"],
        allowed: Bool[Tensor, "b q q"] | QueryGroups,
        memory: Memory,
    ) -> Float[Tensor, "b q d"]:
        """The queries' content, refined once. `allowed` says which queries attend to which."""
        placed = content + position
        content = self.among_norm(content + self.among(placed, placed, content, allowed))
        values = memory.once(self, lambda: self.cross.values(memory.tokens, memory.padding_mask))
        seen = self.cross.gather(content + position, reference, values, memory.level_shapes)
        refined: Tensor = self.feed_forward(self.cross_norm(content + seen))
        return refined


class Refined(NamedTuple):
    """After a layer: the feature for class heads, the reported box, and where the next layer starts.

    The next layer refines `start`, and sees `boxes`: the same boxes, to which no gradient flows. To `start` one flows
    if the decoder looks forward twice: then the loss of the next layer teaches this layer's refinement too.
    """

    feature: Float[Tensor, "b q d"]
    found: Float[Tensor, "b q 4"]
    start: Float[Tensor, "b q 4"]
    boxes: Float[Tensor, "b q 4"]


class LayeredDecoder(nn.Module):
    """What the decoders share: heads, one of each for all layers or one for each layer, and how they are asked.

    Args:
        width: d.
        text_width: Size of a text embedding, t.
        config: Says whether layers share heads.
        prior: The probability of an object that the untrained network predicts.
        similarity: The form of class heads.
    """

    def __init__(
        self, width: int, text_width: int, config: DecoderConfig, prior: float, similarity: SimilarityConfig
    ) -> None:
        super().__init__()
        self.width, self.margin = width, config.box_margin
        self.refines, self.normed = config.refine == "each", config.predictors != "layer"
        self.looks_twice = config.look_forward == "twice"
        self.norm: nn.Module = nn.LayerNorm(width) if self.normed else nn.Identity()
        if config.predictors == "shared":
            # of one type here, of another with heads of each layer
            self.similarity: Any = build_class_head(width, text_width, prior, similarity)
            self.box: Any = BoxHead(width, config.boxes)
            return
        heads = range(config.layers)
        self.similarity = nn.ModuleList(build_class_head(width, text_width, prior, similarity) for _ in heads)
        self.box = nn.ModuleList(BoxHead(width, config.boxes) for _ in heads)

    def refined(self, layer: int, content: Float[Tensor, "b q d"], start: Float[Tensor, "b q 4"]) -> "Refined":
        """What a layer found, and where the next one starts.

        With a norm before the heads the next layer starts from a box that comes from the layer's raw output, while the
        reported one comes from the normalised output, as in DINO. With `refine: none` it starts from the queries' own
        boxes.

        Args:
            layer: Its number.
            content: What the queries are after it.
            start: The boxes that it refines.
        """
        normed, head = self.norm(content), self._head(self.box, layer)
        reference = head.start(start, self.margin)
        found = head(normed, reference)
        if not self.refines:
            return Refined(normed, found, start, start)
        if self.looks_twice:
            following = head(content, reference.detach())
            return Refined(normed, found, following, following.detach())
        following = (head(content, reference) if self.normed else found).detach()
        return Refined(normed, found, following, following)

    def ask(self, decoded: Decoded, tokens: Float[Tensor, "b k c"], slot: Int[Tensor, "b q"]) -> Float[Tensor, "r b q"]:
        """Each query's logit for the category in its slot, after each layer.

        Args:
            decoded: What the decoder found for the queries.
            tokens: Of every slot (`similarity_tokens`).
            slot: Of every query.
        """
        own = gather_rows(tokens, slot)
        layers = enumerate(decoded.features)
        logits = torch.stack([self._head(self.similarity, layer)(features, own) for layer, features in layers])
        return logits if decoded.quality is None else logits + decoded.quality

    def ask_everywhere(
        self, decoded: Decoded, tokens: Float[Tensor, "b k c"]
    ) -> tuple[Float[Tensor, "r b n"], Float[Tensor, "r b n 4"]]:
        """Logits and boxes of all pairs of slot and query, slot by slot, after each layer; n = k * q."""
        layers = enumerate(decoded.features)
        pairs = torch.stack([self._head(self.similarity, n).all_pairs(features, tokens) for n, features in layers])
        if decoded.quality is not None:
            pairs = pairs + decoded.quality.unsqueeze(-1)
        boxes = repeat(decoded.boxes, "r b q four -> r b (k q) four", k=tokens.shape[1])
        return rearrange(pairs, "r b q k -> r b (k q)"), boxes

    def _head(self, heads: nn.Module, layer: int) -> Any:
        return heads[layer] if isinstance(heads, nn.ModuleList) else heads


class Decoder(LayeredDecoder):
    """Deformable decoder layers with iterative box refinement.

    With `positions: first` one layer makes of a query's first box its position, for all layers, and a part of its
    content (Deformable DETR). With `positions: learned` queries bring their positions.
    """

    layer_type: type[nn.Module] = DecoderLayer

    def __init__(
        self,
        width: int,
        levels: int,
        config: DecoderConfig,
        prior: float,
        text_width: int,
        similarity: SimilarityConfig | None = None,
    ) -> None:
        super().__init__(width, text_width, config, prior, similarity or SimilarityConfig())
        self.padded_positions = config.padded_positions
        self.plain = config.positions == "plain"
        self.keeps, self.cells = config.positions == "first", config.first_samples == "cells"
        if config.positions == "learned":
            self.position: nn.Module = nn.Identity()
        elif self.keeps:
            self.position = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width))
        else:
            self.position = _position_head(width, config) if self.plain else MLP((2 * width, width, width))
        self.layers = nn.ModuleList(self.layer_type(width, levels, config) for _ in range(config.layers))

    def forward(self, queries: Queries, memory: Memory) -> Decoded:
        """Features and boxes after every layer; each layer starts from the box that the layer before found."""
        boxes = start = queries.reference_boxes
        allowed = query_groups(queries.group)
        content, kept = self._first(queries, memory)
        features, reported = [], []
        for number, layer in enumerate(self.layers):
            position, reference = self.placed(boxes, memory, kept)
            if self.cells and not (number and self.refines):
                reference = reference[..., :2]
            content = layer(content, position, reference, allowed, memory)
            feature, found, start, boxes = self.refined(number, content, start)
            features.append(feature)
            reported.append(found)
        return Decoded(features=torch.stack(features), boxes=torch.stack(reported))

    def placed(
        self, boxes: Float[Tensor, "b q 4"], memory: Memory, kept: Float[Tensor, "b q d"] | None = None
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b q l 4"]]:
        """What is added to the content of queries with these boxes, and the boxes in each padded level.

        Args:
            boxes: Of the queries.
            memory: The images.
            kept: The positions of the queries' first boxes, where queries keep them.
        """
        reference = boxes.unsqueeze(2) * memory.valid_ratios.tile(1, 1, 2).unsqueeze(1)
        if kept is not None:
            return kept, reference
        placed = reference[:, :, 0] if self.padded_positions else boxes
        return self.position(placed if self.plain else box_encoding(placed, self.width)), reference

    def _first(self, queries: Queries, memory: Memory) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b q d"] | None]:
        """The queries' content before the first layer, and the positions of their first boxes if they keep them."""
        if not self.keeps:
            return queries.content, queries.position
        position, content = self.placed(queries.reference_boxes, memory)[0].chunk(2, dim=-1)
        return queries.content + content, position


class ConditionalDecoderLayer(nn.Module):
    """Self-attention inside each group, conditional cross-attention to the whole memory, feed-forward."""

    def __init__(self, width: int, config: DecoderConfig, first: bool) -> None:
        super().__init__()
        self.among = PlacedSelfAttention(width, config.heads)
        self.among_norm = nn.LayerNorm(width)
        self.cross = ConditionalAttention(width, config.heads, joins_position=first)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward, activation_named(config.activation))

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        place: Float[Tensor, "b q d"],
        allowed: Bool[Tensor, "b q q"] | QueryGroups,
        memory: Memory,
        places: Float[Tensor, "b s d"],
    ) -> Float[Tensor, "b q d"]:
        """The queries' content, refined once.

        Args:
            content: The queries' features.
            position: The learnt embedding of their boxes.
            place: The encoding of their boxes' centres, scaled.
            allowed: Which queries attend to which.
            memory: The images.
            places: The encoding of the memory tokens' places.
        """
        content = self.among_norm(content + self.among(content, position, allowed))
        seen = self.cross(content, position, place, memory.tokens, places, ~memory.padding_mask.unsqueeze(1))
        refined: Tensor = self.feed_forward(self.cross_norm(content + seen))
        return refined


class ConditionalDecoder(LayeredDecoder):
    """Layers with iterative box refinement, whose queries attend near their boxes (DAB-DETR, Liu et al., 2022).

    Attention compares the encoded centre of a query's box with the encoded place of every token. Along each axis
    attention falls off more sharply if the box is small relative to a size that is predicted from the content, unless
    `extents` is off (Conditional DETR).
    """

    def __init__(
        self,
        width: int,
        config: DecoderConfig,
        prior: float,
        text_width: int,
        similarity: SimilarityConfig | None = None,
    ) -> None:
        super().__init__(width, text_width, config, prior, similarity or SimilarityConfig())
        self.learned, self.temperature = config.positions == "learned", float(config.temperature)
        self.smallest_side = config.smallest_side
        self.position: nn.Module = nn.Identity() if self.learned else MLP((2 * width, width, width))
        self.scale = unit_scale(width) if config.layers > 1 else None
        self.extent = MLP((width, width, 2)) if config.extents else None
        self.layers = nn.ModuleList(ConditionalDecoderLayer(width, config, n == 0) for n in range(config.layers))

    def forward(self, queries: Queries, memory: Memory) -> Decoded:
        """Features and boxes after every layer; boxes are refined as in `Decoder`."""
        content = queries.content
        boxes = start = queries.reference_boxes
        allowed = query_groups(queries.group)
        places = token_places(memory, self.width, self.temperature)
        features, reported = [], []
        for index, layer in enumerate(self.layers):
            encoded = box_encoding(boxes, self.width)
            place = encoded[..., : self.width] * self._sharpness(content, boxes)
            if index and self.scale is not None:
                place = place * self.scale(content)
            position = queries.position if self.learned else self.position(encoded)
            content = layer(content, position, place, allowed, memory, places)
            feature, found, start, boxes = self.refined(index, content, start)
            features.append(feature)
            reported.append(found)
        return Decoded(features=torch.stack(features), boxes=torch.stack(reported))

    def _sharpness(
        self, content: Float[Tensor, "b q d"], boxes: Float[Tensor, "b q 4"]
    ) -> Float[Tensor, "b q d"] | float:
        """Factors of the encoded centre: predicted size / box size, first for y and then for x; 1 without extents."""
        if self.extent is None:
            return 1.0
        predicted = self.extent(content).sigmoid()
        ratio: Tensor = predicted / boxes[..., 2:].clamp(min=self.smallest_side)
        return ratio.flip(-1).repeat_interleave(self.width // 2, dim=-1)


def _position_head(width: int, config: DecoderConfig) -> MLP:
    """From a box's four numbers to a query's position: RT-DETR's two layers, or DEIMv2's three."""
    widths = (4, 2 * width, width) if config.position_layers == 2 else (4, width, width, width)
    return MLP(widths, nn.SiLU if config.position_activation == "silu" else nn.ReLU)
