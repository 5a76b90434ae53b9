"""The decoder of DAB-DETR: queries are boxes, and where they look follows their centre and size."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.layers.conditional_attention import ConditionalAttention, PlacedSelfAttention
from metr.layers.mlp import MLP, FeedForward
from metr.layers.position_encoding import box_encoding
from metr.models.class_queries import rows
from metr.models.config import DecoderConfig, SimilarityConfig
from metr.models.decoder import DecoderAnswer
from metr.models.encoders.plain import token_places
from metr.models.heads import BoxHead, SimilarityHead, box_logits, similarity_tokens
from metr.structures import Categories, Memory, Queries

# a box thinner than this share of the image is looked at as if it were that thick
_THINNEST = 1e-3


class ConditionalDecoderLayer(nn.Module):
    """Self-attention inside each group, conditional cross-attention to the whole memory, feed-forward."""

    def __init__(self, width: int, config: DecoderConfig, first: bool) -> None:
        super().__init__()
        self.among = PlacedSelfAttention(width, config.heads)
        self.among_norm = nn.LayerNorm(width)
        self.cross = ConditionalAttention(width, config.heads, joins_position=first)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        place: Float[Tensor, "b q d"],
        allowed: Bool[Tensor, "b q q"],
        memory: Memory,
        places: Float[Tensor, "b s d"],
    ) -> Float[Tensor, "b q d"]:
        """The queries' content, refined once.

        Args:
            content: What the queries hold.
            position: The learnt embedding of their boxes.
            place: Their encoded centres, scaled to where they look.
            allowed: Which queries attend to which.
            memory: The image.
            places: Where the memory's tokens lie.
        """
        content = self.among_norm(content + self.among(content, position, allowed))
        seen = self.cross(content, position, place, memory.tokens, places, ~memory.padding_mask.unsqueeze(1))
        refined: Tensor = self.feed_forward(self.cross_norm(content + seen))
        return refined


class ConditionalDecoder(nn.Module):
    """Layers with iterative box refinement (Liu et al., 2022); the heads are the same after every layer.

    A query looks near its box: the encoded centre is compared with the encoded place of every token, along each axis
    the more sharply the smaller the box is beside the size that the content asks for.
    """

    def __init__(
        self, width: int, config: DecoderConfig, prior: float, similarity: SimilarityConfig | None = None
    ) -> None:
        super().__init__()
        self.compared = similarity or SimilarityConfig()
        self.width = width
        self.position = MLP((2 * width, width, width))
        self.scale = _scale(width) if config.layers > 1 else None
        self.extent = MLP((width, width, 2))
        self.layers = nn.ModuleList(ConditionalDecoderLayer(width, config, n == 0) for n in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.similarity = SimilarityHead(width, prior, self.compared)
        self.box = BoxHead(width)

    def forward(self, queries: Queries, memory: Memory, categories: Categories) -> DecoderAnswer:
        """Answers after every layer.

        Each layer starts from the box that the layer before found, without gradient. That box comes from the layer's
        raw output, the reported one from the normalised output.
        """
        content, boxes = queries.content, queries.reference_boxes
        tokens = rows(similarity_tokens(categories, self.compared), queries.slot)
        allowed = queries.group.unsqueeze(2) == queries.group.unsqueeze(1)
        places = token_places(memory, self.width)
        logits, found = [], []
        for index, layer in enumerate(self.layers):
            encoded = box_encoding(boxes, self.width)
            place = encoded[..., : self.width] * self._sharpness(content, boxes)
            if index and self.scale is not None:
                place = place * self.scale(content)
            content = layer(content, self.position(encoded), place, allowed, memory, places)
            normed, start = self.norm(content), box_logits(boxes)
            logits.append(self.similarity(normed, tokens))
            found.append(self.box(normed, start))
            boxes = self.box(content, start).detach()
        return DecoderAnswer(torch.stack(logits), torch.stack(found))

    def _sharpness(self, content: Float[Tensor, "b q d"], boxes: Float[Tensor, "b q 4"]) -> Float[Tensor, "b q d"]:
        """How much more than the tokens' places the centre weighs: wanted size / size, for y and then for x."""
        wanted = self.extent(content).sigmoid()
        ratio: Tensor = wanted / boxes[..., 2:].clamp(min=_THINNEST)
        return ratio.flip(-1).repeat_interleave(self.width // 2, dim=-1)


def _scale(width: int) -> MLP:
    """What scales encoded centres by the content, number by number. It starts by changing nothing."""
    scale = MLP((width, width, width))
    nn.init.zeros_(scale.last.weight)
    nn.init.ones_(scale.last.bias)
    return scale
