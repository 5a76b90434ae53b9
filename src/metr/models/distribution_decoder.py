"""The decoder of D-FINE (Peng et al., 2024): layers refine where the edges of a box probably are.

The first layer finds a box. Every layer then predicts how far each edge of that box is from where it should be, as a
distribution over a fixed set of shifts; a layer changes the distributions of the layer before. The shape of the
distributions also tells how good a box is.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.boxes import xyxy_to_cxcywh
from metr.layers.attention import Attention
from metr.layers.deformable_attention import DeformableAttention
from metr.layers.groups import QueryGroups, query_groups
from metr.layers.mlp import MLP, FeedForward, GatedFeedForward, build_norm
from metr.models.config import DecoderConfig, DistributionConfig, SimilarityConfig
from metr.models.decoder import Decoder
from metr.models.heads import BoxHead, box_logits
from metr.structures import Decoded, Memory, Queries

# The largest number in a query's position.
_FARTHEST = 10.0


class GatedDecoderLayer(nn.Module):
    """Self-attention inside each group, deformable cross-attention to the memory behind a gate, feed-forward.

    Without a gate, what the queries see is added to what they were.
    """

    def __init__(self, width: int, levels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads)
        self.among_norm = build_norm(width, config.norm)
        self.cross = DeformableAttention(width, config.heads, levels, config.points, projected=False)
        self.gate = nn.Linear(2 * width, 2 * width) if config.gate else None
        self.cross_norm = build_norm(width, config.norm)
        self.feed_forward: nn.Module = (
            GatedFeedForward(width, config.feed_forward, config.norm)
            if config.activation == "swiglu"
            else FeedForward(width, config.feed_forward, norm=config.norm)
        )
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l 4"],
        allowed: Bool[Tensor, "b q q"] | QueryGroups,
        memory: Memory,
    ) -> Float[Tensor, "b q d"]:
        """The queries' content, refined once. `allowed` says which queries attend to which."""
        placed = content + position
        content = self.among_norm(content + self.among(placed, placed, content, allowed))
        seen = self.cross(content + position, reference, memory.tokens, memory.padding_mask, memory.level_shapes)
        refined: Tensor = self.feed_forward(self._gated(content, seen))
        return refined

    def _gated(self, content: Float[Tensor, "b q d"], seen: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        """What the queries were and what they saw, each channel weighed by a gate if there is one."""
        if self.gate is None:
            added: Tensor = self.cross_norm(content + seen)
            return added
        keep, take = self.gate(torch.cat([content, seen], dim=-1)).sigmoid().chunk(2, dim=-1)
        gated: Tensor = self.cross_norm(keep * content + take * seen)
        return gated


class EdgeShifts(nn.Module):
    """From the distributions of a box's edges to their mean shifts outwards, in sides of the box.

    The possible shifts lie symmetrically around zero. They grow exponentially up to `reach`, and the outermost is twice
    that. The greater `flatness`, the more even they are.
    """

    reach: Tensor
    flatness: Tensor

    def __init__(self, config: DistributionConfig) -> None:
        super().__init__()
        self.bins = config.bins
        self.register_buffer("reach", torch.tensor([config.reach]))
        self.register_buffer("flatness", torch.tensor([config.flatness]))

    def forward(self, logits: Float[Tensor, "*n edges v"]) -> Float[Tensor, "*n edges"]:
        """The mean shift of each edge."""
        # no matrix product, which would round to the network's precision
        return (logits.float().softmax(-1) * self.values()).sum(-1)

    def values(self) -> Float[Tensor, "v"]:
        """The possible shifts, ascending."""
        flatness = self.flatness.float().abs()
        top = self.reach.float().abs() * flatness
        ratio = (top + 1) ** (2 / (self.bins - 2))
        steps = ratio ** torch.arange(1, self.bins // 2, device=ratio.device) - 1
        upper = torch.cat([steps, 2 * top])
        return torch.cat([-upper.flip(0), torch.zeros_like(top), upper]) / flatness


class QualityHead(nn.Module):
    """A logit for "are the edges of this box well known?", added to the logits of every category.

    It reads the largest probabilities of each edge, and their mean. Untrained, it is 0.
    """

    def __init__(self, config: DistributionConfig) -> None:
        super().__init__()
        self.bins = config.quality_bins
        hidden = [config.quality_width] * (config.quality_layers - 1)
        self.read = _quiet(MLP((4 * (self.bins + 1), *hidden, 1)))

    def forward(self, logits: Float[Tensor, "b q 4 v"]) -> Float[Tensor, "b q"]:
        """One logit a box."""
        largest = logits.softmax(-1).topk(self.bins, dim=-1).values
        told = torch.cat([largest, largest.mean(-1, keepdim=True)], dim=-1)
        quality: Tensor = self.read(rearrange(told, "b q edges n -> b q (edges n)")).squeeze(-1)
        return quality.float()


class DistributionDecoder(Decoder):
    """Deformable decoder layers, each of which refines the distributions of the edges of one box.

    Each layer has a quality head of its own, and one for distributions unless they share it. The first layer has two
    outputs: its own box, and what its distributions make of that.
    """

    layer_type = GatedDecoderLayer

    def __init__(
        self,
        width: int,
        levels: int,
        config: DecoderConfig,
        prior: float,
        text_width: int,
        similarity: SimilarityConfig | None = None,
    ) -> None:
        super().__init__(width, levels, config, prior, text_width, similarity)
        self.box = BoxHead(width)
        self.shifts = EdgeShifts(config.distribution)
        edges = 4 * (config.distribution.bins + 1)
        if config.distribution.shared:
            # of one type here, of another with heads of each layer
            self.distributions: Any = _quiet(MLP((width, width, width, edges)))
        else:
            self.distributions = nn.ModuleList(_quiet(MLP((width, width, width, edges))) for _ in self.layers)
        self.quality = nn.ModuleList(QualityHead(config.distribution) for _ in self.layers)

    def forward(self, queries: Queries, memory: Memory) -> Decoded:
        """Features, boxes and qualities: those of the first layer's own box, then those of every layer.

        Each layer starts from the box that the layer before found, without gradient. Distributions are passed on with
        it, so that a loss of a later layer also teaches the heads of earlier ones.
        """
        content, boxes, allowed = queries.content, queries.reference_boxes, query_groups(queries.group)
        before, logits = torch.zeros_like(content), boxes.new_zeros(())
        first: Tensor | None = None
        outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, (layer, judge) in enumerate(zip(self.layers, self.quality, strict=True)):
            position, reference = self.placed(boxes, memory)
            content = layer(content, position.clamp(-_FARTHEST, _FARTHEST), reference, allowed, memory)
            feature = self.norm(content)
            if first is None:
                first = self.box(content, box_logits(boxes, self.margin))
                outputs.append((feature, first, first.new_zeros(first.shape[:2])))
            distribution = super()._head(self.distributions, number)
            change = rearrange(distribution(content + before).float(), "b q (edges v) -> b q edges v", edges=4)
            logits = logits + change
            found = shifted(first.detach(), self.shifts(logits))
            outputs.append((feature, found, judge(logits)))
            before, boxes = content.detach(), found.detach()
        features, found, quality = map(torch.stack, zip(*outputs, strict=True))
        return Decoded(features=features, boxes=found, quality=quality)

    def _head(self, heads: nn.Module, output: int) -> Any:
        """The class head of an output: the first layer's for its two outputs."""
        return super()._head(heads, max(output - 1, 0))


def shifted(boxes: Float[Tensor, "*n 4"], shifts: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """cxcywh boxes whose left, top, right and bottom edges are moved outwards, by shifts in sides of the box."""
    (centre, side), (low, high) = boxes.chunk(2, dim=-1), (0.5 + shifts).chunk(2, dim=-1)
    return xyxy_to_cxcywh(torch.cat([centre - low * side, centre + high * side], dim=-1))


def _quiet(head: MLP) -> MLP:
    """The head, so that untrained it predicts 0."""
    nn.init.zeros_(head.last.weight)
    nn.init.zeros_(head.last.bias)
    return head
