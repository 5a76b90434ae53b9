"""The decoder: queries attend to their own group and to a few places of the memory, and refine their boxes."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.deformable_attention import DeformableAttention
from metr.layers.mlp import MLP, FeedForward
from metr.layers.position_encoding import box_encoding
from metr.models.class_queries import rows
from metr.models.config import DecoderConfig, SimilarityConfig
from metr.models.heads import BoxHead, SimilarityHead, box_logits, similarity_tokens
from metr.structures import Categories, Memory, Queries


class DecoderAnswer(NamedTuple):
    """One logit and one box for each query and layer."""

    logits: Float[Tensor, "r b q"]
    boxes: Float[Tensor, "r b q 4"]


class DecoderLayer(nn.Module):
    """Self-attention inside each group, deformable cross-attention to the memory, feed-forward."""

    def __init__(self, width: int, levels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads)
        self.among_norm = nn.LayerNorm(width)
        self.cross = DeformableAttention(width, config.heads, levels, config.points)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l 4"],
        allowed: Bool[Tensor, "b q q"],
        memory: Memory,
    ) -> Float[Tensor, "b q d"]:
        """The queries' content, refined once."""
        placed = content + position
        content = self.among_norm(content + self.among(placed, placed, content, allowed))
        values = memory.once(self, lambda: self.cross.values(memory.tokens, memory.padding_mask))
        seen = self.cross.gather(content + position, reference, values, memory.level_shapes)
        refined: Tensor = self.feed_forward(self.cross_norm(content + seen))
        return refined


class Decoder(nn.Module):
    """Layers with iterative box refinement; the heads are the same after every layer."""

    def __init__(
        self, width: int, levels: int, config: DecoderConfig, prior: float, similarity: SimilarityConfig | None = None
    ) -> None:
        super().__init__()
        self.compared = similarity or SimilarityConfig()
        self.width, self.padded_positions = width, config.padded_positions
        self.plain = config.positions == "plain"
        self.position = MLP((4, 2 * width, width) if self.plain else (2 * width, width, width))
        self.layers = nn.ModuleList(DecoderLayer(width, levels, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.similarity = SimilarityHead(width, prior, self.compared)
        self.box = BoxHead(width)

    def forward(self, queries: Queries, memory: Memory, categories: Categories) -> DecoderAnswer:
        """Answers after every layer.

        Each layer starts from the box that the layer before found, without gradient. That box comes from the layer's
        raw output, the reported one from the normalised output, as in DINO.
        """
        content, boxes = queries.content, queries.reference_boxes
        tokens = rows(similarity_tokens(categories, self.compared), queries.slot)
        allowed = queries.group.unsqueeze(2) == queries.group.unsqueeze(1)
        scale = memory.valid_ratios.tile(1, 1, 2).unsqueeze(1)
        logits, found = [], []
        for layer in self.layers:
            reference = boxes.unsqueeze(2) * scale
            placed = reference[:, :, 0] if self.padded_positions else boxes
            position = self.position(placed if self.plain else box_encoding(placed, self.width))
            content = layer(content, position, reference, allowed, memory)
            normed, start = self.norm(content), box_logits(boxes)
            logits.append(self.similarity(normed, tokens))
            found.append(self.box(normed, start))
            boxes = self.box(content, start).detach()
        return DecoderAnswer(torch.stack(logits), torch.stack(found))
