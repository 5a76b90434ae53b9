"""Proposals: which (category, place) pairs become queries, and from which boxes they start."""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.models.class_queries import rows
from metr.models.config import QueryConfig, SimilarityConfig
from metr.models.heads import BoxHead, similarity_tokens
from metr.structures import Categories, Memory, Proposals


class ProposalHead(nn.Module):
    """Scores every place of the memory for every kept category, and picks the queries' pairs.

    A place's logit for a category is factor (linear of its feature) . (the category's token) / sqrt(d) + b, and with
    `objectness` a linear layer's word on the feature alone; its box is an anchor, moved by what the feature says, the
    same for every category.
    """

    def __init__(
        self, width: int, config: QueryConfig, prior: float, similarity: SimilarityConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self.compared = config, similarity or SimilarityConfig()
        self.feature = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.category = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.tensor([math.log(prior / (1 - prior))]))
        self.objectness = nn.Linear(width, 1, bias=False) if self.compared.objectness else None
        self.box = BoxHead(width)
        self.scale = self.compared.factor / math.sqrt(width)
        with torch.no_grad():  # it starts as it would without the factor
            for parameter in self.category.parameters():
                parameter.div_(self.compared.factor)

    def forward(self, memory: Memory, categories: Categories) -> tuple[Proposals, Float[Tensor, "b q d"]]:
        """The chosen pairs, and the features of their places."""
        anchors, usable, features = memory.once(self, lambda: self._places(memory))
        places, ranks, slots, valid = self._choose(features, usable, categories)
        chosen = rows(features, places)
        tokens = rows(similarity_tokens(categories, self.compared), slots)
        logits = self._similarity(chosen, tokens)
        proposals = Proposals(
            logits=logits,
            boxes=self.box(chosen, rows(anchors, places)),
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
        """What is known of each place; places that cannot hold a box know nothing."""
        known: Tensor = self.norm(self.feature(memory.tokens * usable.unsqueeze(-1)))
        return known

    def scores(self, features: Float[Tensor, "b s d"], tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b s n"]:
        """The logit of every place for every token.

        The linear layer is moved to the tokens' side (f W . t = f . W^T t): they are few, the places many.
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
        self, features: Tensor, usable: Tensor, categories: Categories
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Place, rank, slot and validity of each query."""
        if self.config.layout == "shared":
            scores = self.scores(features, categories.tokens).amax(-1).masked_fill(~usable, -torch.inf)
            share = max(1, min(self.config.number // categories.ids.shape[1], self.config.ceiling, scores.shape[1]))
            best, places = scores.topk(share, dim=1)
            every = categories.ids.shape[1]
            best, places = (repeat(x, "b c -> b k c", k=every) for x in (best, places))
        else:
            tokens = similarity_tokens(categories, self.compared)
            scores = self.scores(features, tokens).masked_fill(~usable.unsqueeze(-1), -torch.inf)
            most = min(self.config.ceiling, self.config.number, scores.shape[1])
            best, places = rearrange(scores, "b s k -> b k s").topk(most, dim=-1)
        priority = share_out(best.float(), categories.valid, self.config)
        slots, ranks, valid = take_pairs(priority, self.config.number)
        places = rearrange(places, "b k c -> b (k c)").gather(1, slots * priority.shape[2] + ranks)
        return places, ranks, slots, valid


def share_out(best: Float[Tensor, "b k c"], valid: Bool[Tensor, "b k"], config: QueryConfig) -> Float[Tensor, "b k c"]:
    """How much each pair (slot, rank) deserves one of the Q queries; -inf means never.

    `best` holds the proposal logits of each slot's best places in falling order. `uniform` and `shared` give each
    kept category the same count: a rank below Q / (number of kept categories). `budget` gives each the first `floor`
    ranks and orders the other pairs by their logits.
    """
    rank = torch.arange(best.shape[2], device=best.device).expand_as(best)
    # where not every pair of one rank fits, the likelier ones come first: less than a rank apart
    likely = best.sigmoid().nan_to_num() / 2
    if config.layout == "budget":
        # floors come first, rank by rank, so that a budget too small for all floors is shared evenly
        top = best.nan_to_num(neginf=0.0, posinf=0.0).abs().amax((1, 2), keepdim=True) + 1
        priority = torch.where(rank < config.floor, top + (config.floor - rank) + likely, best)
    else:
        count = valid.sum(dim=1).clamp(min=1)
        share = (config.number // count).clamp(min=1)[:, None, None]
        priority = (likely - rank).masked_fill(rank >= share, -torch.inf)
    never = ~valid.unsqueeze(-1) | best.isneginf()
    return priority.masked_fill(never, -torch.inf)


def take_pairs(
    priority: Float[Tensor, "b k c"], number: int
) -> tuple[Int[Tensor, "b q"], Int[Tensor, "b q"], Bool[Tensor, "b q"]]:
    """The (slot, rank) pairs of highest priority, ordered by slot and rank, invalid ones last.

    A category's taken ranks need not be gapless; a rank is a pair's place in its category's order of places.
    """
    flat = rearrange(priority, "b k c -> b (k c)")
    best, index = flat.topk(min(number, flat.shape[1]), dim=1)
    valid = best > -torch.inf
    order = index.masked_fill(~valid, flat.shape[1]).argsort(dim=1)
    index, valid = index.gather(1, order), valid.gather(1, order)
    index = index.masked_fill(~valid, 0)
    return index // priority.shape[2], index % priority.shape[2], valid


def anchor_logits(memory: Memory) -> tuple[Float[Tensor, "b s 4"], Bool[Tensor, "b s"]]:
    """An anchor at every place, in logit space, and where it can be used.

    Centre: the cell's centre; sides: 0.05 of the image on the finest level, twice as much on each coarser one.
    A place cannot be used where it is padding or where a number of its anchor is outside (0.01, 0.99).
    """
    boxes = []
    for level, (height, width) in enumerate(memory.level_shapes):
        ratios = memory.valid_ratios[:, level]
        y = torch.arange(height, device=ratios.device) + 0.5
        x = torch.arange(width, device=ratios.device) + 0.5
        cells = torch.stack([x.expand(height, -1), y.unsqueeze(1).expand(-1, width)], dim=-1)
        size = (ratios * ratios.new_tensor([width, height])).unsqueeze(1)
        centre = rearrange(cells, "h w x -> 1 (h w) x") / size
        boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2**level)], dim=-1))
    anchors = torch.cat(boxes, dim=1)
    usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding_mask
    logits = (anchors / (1 - anchors)).log()
    return logits.masked_fill(~usable.unsqueeze(-1), torch.inf), usable
