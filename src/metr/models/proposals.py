"""Proposals and class-specific queries: which (category, place) pairs become queries, and what these start with."""

import math
from dataclasses import replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.models.config import QueryConfig, SimilarityConfig
from metr.models.encoders.pyramid import cell_centres
from metr.models.heads import BoxHead, similarity_tokens
from metr.structures import Categories, Memory, NameLimits, Proposals, Queries, gather_rows


class ProposalHead(nn.Module):
    """Scores every place of the memory for every category with a slot, and chooses the pairs that become queries.

    The logit of a place for a category is factor * (linear layer of the place's feature) . (the category's token) /
    sqrt(d) + b. With `objectness` a linear layer of the feature alone is added. The box of a place is an anchor,
    refined from the feature; it is the same for every category.
    """

    def __init__(
        self, width: int, config: QueryConfig, prior: float, similarity: SimilarityConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self.similarity_config = config, similarity or SimilarityConfig()
        self.feature = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.category = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.tensor([math.log(prior / (1 - prior))]))
        self.objectness = nn.Linear(width, 1, bias=False) if self.similarity_config.objectness else None
        self.box = BoxHead(width)
        self.scale = self.similarity_config.factor / math.sqrt(width)
        with torch.no_grad():  # the factor leaves initial logits alone
            for parameter in self.category.parameters():
                parameter.div_(self.similarity_config.factor)

    def forward(
        self, memory: Memory, categories: Categories, limits: NameLimits | None = None
    ) -> tuple[Proposals, Float[Tensor, "b q d"]]:
        """The chosen pairs, at most `limits.queries` for each name, and the features of their places."""
        anchors, usable, features = memory.once(self, lambda: self._places(memory))
        limit = None if limits is None else limits.queries[categories.ids]
        places, ranks, slots, valid = self._choose(features, usable, categories, limit)
        chosen = gather_rows(features, places)
        tokens = gather_rows(similarity_tokens(categories, self.similarity_config), slots)
        logits = self._similarity(chosen, tokens)
        proposals = Proposals(
            logits=logits,
            boxes=self.box(chosen, gather_rows(anchors, places)),
            place=places,
            slot=slots,
            rank=ranks,
            valid=valid,
        )
        return proposals, chosen

    def _places(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Anchor, usability and feature of each place."""
        anchors, usable = anchor_logits(memory)
        return anchors, usable, self.features(memory, usable)

    def features(self, memory: Memory, usable: Bool[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """The feature of each place; all places without a usable anchor share one."""
        known: Tensor = self.norm(self.feature(memory.tokens * usable.unsqueeze(-1)))
        return known

    def scores(self, features: Float[Tensor, "b s d"], tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b s n"]:
        """The logit of every place for every token.

        The linear layer is applied to the tokens instead of the features (f W . t = f . W^T t): tokens are far fewer.
        """
        turned = tokens @ self.category.weight
        shift = (tokens @ self.category.bias).unsqueeze(1)
        logits = (features @ turned.transpose(1, 2) + shift) * self.scale + self.bias
        return logits if self.objectness is None else logits + self.objectness(features)

    def _similarity(self, features: Float[Tensor, "b q d"], tokens: Float[Tensor, "b q d"]) -> Float[Tensor, "b q"]:
        similarity: Tensor = (self.category(features) * tokens).sum(-1)
        logits = similarity * self.scale + self.bias
        return logits if self.objectness is None else logits + self.objectness(features).squeeze(-1)

    @torch.no_grad()
    def _choose(
        self, features: Tensor, usable: Tensor, categories: Categories, limit: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Place, rank, slot and validity of each query."""
        if self.config.layout == "shared":
            scores = self.scores(features, categories.tokens).amax(-1).masked_fill(~usable, -torch.inf)
            share = max(1, min(self.config.number // categories.ids.shape[1], self.config.ceiling, scores.shape[1]))
            best, places = scores.topk(share, dim=1)
            every = categories.ids.shape[1]
            best, places = (repeat(x, "b c -> b k c", k=every) for x in (best, places))
        else:
            tokens = similarity_tokens(categories, self.similarity_config)
            scores = self.scores(features, tokens).masked_fill(~usable.unsqueeze(-1), -torch.inf)
            most = min(self.config.ceiling, self.config.number, scores.shape[1])
            best, places = rearrange(scores, "b s k -> b k s").topk(most, dim=-1)
        priority = share_out(best.float(), categories.valid, self.config, limit)
        slots, ranks, valid = take_pairs(priority, self.config.number)
        places = rearrange(places, "b k c -> b (k c)").gather(1, slots * priority.shape[2] + ranks)
        return places, ranks, slots, valid


class ClassQueries(nn.Module):
    """Queries of proposals. Content = learned query (by rank in its category's group) + the category's refined token.

    With `content: place` a linear layer of the feature of the query's place is added, without gradient to the feature
    (as in DINO and RT-DETR).
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.learned = nn.Embedding(config.ceiling, width)
        self.place = nn.Linear(width, width) if config.content == "place" else None
        self.together = config.attention == "image"

    def forward(self, proposals: Proposals, features: Float[Tensor, "b q d"], categories: Categories) -> Queries:
        """One query for each proposal. It starts from the proposal's box, to which no gradient flows back."""
        content = self.learned(proposals.rank) + gather_rows(categories.kept_tokens, proposals.slot)
        if self.place is not None:
            content = content + self.place(features.detach())
        group = torch.zeros_like(proposals.slot) if self.together else proposals.slot
        return Queries(
            content=content,
            reference_boxes=proposals.boxes.detach(),
            slot=proposals.slot,
            group=group.masked_fill(~proposals.valid, -1),
            valid=proposals.valid,
        )


def side_by_side(first: Queries, second: Queries) -> Queries:
    """The queries of `first`, then those of `second`."""
    return replace(
        first,
        content=torch.cat([first.content, second.content], dim=1),
        reference_boxes=torch.cat([first.reference_boxes, second.reference_boxes], dim=1),
        slot=torch.cat([first.slot, second.slot], dim=1),
        group=torch.cat([first.group, second.group], dim=1),
        valid=torch.cat([first.valid, second.valid], dim=1),
    )


def share_out(
    best: Float[Tensor, "b k c"],
    valid: Bool[Tensor, "b k"],
    config: QueryConfig,
    limit: Int[Tensor, "b k"] | None = None,
) -> Float[Tensor, "b k c"]:
    """The priority by which each pair (slot, rank) becomes a query; -inf excludes a pair.

    `best` holds the proposal logits of each slot's best places, highest first. The layouts `uniform` and `shared` give
    each category the same number of queries: the ranks below Q / (number of categories with a slot). `budget` gives
    each category its first `floor` ranks, and orders the other pairs by their logits. No category gets more than its
    `limit`.
    """
    rank = torch.arange(best.shape[2], device=best.device).expand_as(best)
    # Where not all pairs of a rank fit, the likelier ones come first. This adds at most half a rank.
    likely = best.sigmoid().nan_to_num() / 2
    if config.layout == "budget":
        # Floors come first, rank by rank: a budget too small for all floors is shared evenly.
        top = best.nan_to_num(neginf=0.0, posinf=0.0).abs().amax((1, 2), keepdim=True) + 1
        priority = torch.where(rank < config.floor, top + (config.floor - rank) + likely, best)
    else:
        count = valid.sum(dim=1).clamp(min=1)
        share = (config.number // count).clamp(min=1)[:, None, None]
        priority = (likely - rank).masked_fill(rank >= share, -torch.inf)
    never = ~valid.unsqueeze(-1) | best.isneginf()
    if limit is not None:
        never = never | (rank >= limit.unsqueeze(-1))
    return priority.masked_fill(never, -torch.inf)


def take_pairs(
    priority: Float[Tensor, "b k c"], number: int
) -> tuple[Int[Tensor, "b q"], Int[Tensor, "b q"], Bool[Tensor, "b q"]]:
    """Slot, rank and validity of the pairs of highest priority, ordered by slot and rank, invalid ones last.

    The ranks of a category may have gaps; a rank is the position of a place among the category's best places.
    """
    flat = rearrange(priority, "b k c -> b (k c)")
    best, index = flat.topk(min(number, flat.shape[1]), dim=1)
    valid = best > -torch.inf
    order = index.masked_fill(~valid, flat.shape[1]).argsort(dim=1)
    index, valid = index.gather(1, order), valid.gather(1, order)
    index = index.masked_fill(~valid, 0)
    return index // priority.shape[2], index % priority.shape[2], valid


def anchor_logits(memory: Memory) -> tuple[Float[Tensor, "b s 4"], Bool[Tensor, "b s"]]:
    """The anchor of every place in logit space, and whether the place is usable.

    An anchor's centre is that of its cell; its sides are 0.05 of the image on the finest level, and twice as long on
    each coarser level. A place is usable unless it is padding or a coordinate of its anchor is outside (0.01, 0.99).
    """
    centres = cell_centres(memory)
    sides = [centres.new_full((h * w, 2), 0.05 * 2**level) for level, (h, w) in enumerate(memory.level_shapes)]
    anchors = torch.cat([centres, torch.cat(sides).expand_as(centres)], dim=-1)
    usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding_mask
    logits = (anchors / (1 - anchors)).log()
    return logits.masked_fill(~usable.unsqueeze(-1), torch.inf), usable
