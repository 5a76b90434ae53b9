"""Proposals and class-specific queries: which (category, place) pairs become queries, and what these start with."""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.boxes import moved
from metr.models.config import QueryConfig, SimilarityConfig
from metr.models.encoders.pyramid import cell_centres
from metr.models.heads import BoxHead, ClassifierHead, similarity_tokens
from metr.structures import Categories, Memory, Proposals, Queries, gather_rows


class ProposalHead(nn.Module):
    """Scores every place of the memory for every category with a slot, and chooses the pairs that become queries.

    The box of a place is an anchor, refined from the feature; it is the same for every category.
    """

    def __init__(
        self,
        width: int,
        config: QueryConfig,
        prior: float,
        text_width: int,
        similarity: SimilarityConfig | None = None,
        boxes: Literal["logit", "reparametrised"] = "logit",
    ) -> None:
        super().__init__()
        self.config, self.similarity_config = config, similarity or SimilarityConfig()
        self.feature = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.box = BoxHead(width, boxes)
        if self.similarity_config.form == "classifier":
            self.classifier: ClassifierHead | None = ClassifierHead(width, text_width, prior)
            return
        self.classifier = None
        self.category = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.tensor([math.log(prior / (1 - prior))]))
        self.objectness = nn.Linear(width, 1, bias=False) if self.similarity_config.objectness else None
        self.scale = self.similarity_config.factor / math.sqrt(width)
        with torch.no_grad():  # the factor leaves initial logits alone
            for parameter in self.category.parameters():
                parameter.div_(self.similarity_config.factor)

    def forward(
        self, memory: Memory, categories: Categories, most: Int[Tensor, "b k"] | None = None
    ) -> tuple[Proposals, Float[Tensor, "b _n d"]]:
        """The chosen pairs, at most so many for each slot, and the features of their places.

        In the layout `places` all pairs of a chosen place and a slot are chosen, slot by slot, without limits; the
        features are those of the places, each once.
        """
        anchors, usable, features = memory.once(self, lambda: self._places(memory))
        number = self.config.number
        if self.config.layout == "places":
            return self._everywhere(anchors, usable, features, categories, number)
        pairs = self._choose(features, usable.unsqueeze(-1), categories, number, most)
        return self._proposed(anchors, features, categories, pairs)

    @torch.no_grad()
    def next_best(self, memory: Memory, categories: Categories, taken: Proposals) -> tuple[Proposals, Tensor]:
        """The best pairs beside those that are taken, `one_to_many.number` of them, and the features of their places.

        They are shared out as the others are. Nothing is taught by way of them: they have no gradient.
        """
        anchors, usable, features = memory.once(self, lambda: self._places(memory))
        number = self.config.one_to_many.number
        if self.config.layout == "places":
            others = usable.scatter(1, taken.place, False)
            proposals, chosen = self._everywhere(anchors, others, features, categories, number)
            return replace(proposals, rank=proposals.rank % self.config.number), chosen
        slots = categories.ids.shape[1]
        index = taken.place * slots + taken.slot
        used = torch.zeros_like(usable, dtype=torch.float32).repeat(1, slots).scatter_add(1, index, taken.valid.float())
        others = usable.unsqueeze(-1) & (rearrange(used, "b (s k) -> b s k", k=slots) == 0)
        return self._proposed(anchors, features, categories, self._choose(features, others, categories, number))

    def _proposed(
        self, anchors: Tensor, features: Tensor, categories: Categories, pairs: "_Pairs"
    ) -> tuple[Proposals, Tensor]:
        """Logits and boxes of the chosen pairs, and the features of their places."""
        places, ranks, slots, valid = pairs
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

    def _everywhere(
        self, anchors: Tensor, usable: Tensor, features: Tensor, categories: Categories, number: int
    ) -> tuple[Proposals, Tensor]:
        """The pairs of the best places with every slot, and the features of these places."""
        tokens = similarity_tokens(categories, self.similarity_config)
        with torch.no_grad():
            best, places = self._best_places(self.scores(features, tokens), usable, categories.valid, number)
        chosen, slots = gather_rows(features, places), categories.ids.shape[1]
        boxes = self.box(chosen, gather_rows(anchors, places))
        pairs = rearrange(self.scores(chosen, tokens), "b p k -> b (k p)")
        every = torch.arange(pairs.shape[1], device=pairs.device).expand_as(pairs)
        proposals = Proposals(
            logits=pairs,
            boxes=repeat(boxes, "b p four -> b (k p) four", k=slots),
            place=repeat(places, "b p -> b (k p)", k=slots),
            slot=every // places.shape[1],
            rank=every % places.shape[1],
            valid=rearrange(categories.valid.unsqueeze(2) & (best > -torch.inf).unsqueeze(1), "b k p -> b (k p)"),
        )
        return proposals, chosen

    def _best_places(
        self, scores: Float[Tensor, "b s k"], usable: Bool[Tensor, "b s"], valid: Bool[Tensor, "b k"], number: int
    ) -> tuple[Float[Tensor, "b p"], Int[Tensor, "b p"]]:
        """Score and index of the places that score best for any category with a slot, best first."""
        scores = scores.masked_fill(~valid.unsqueeze(1), -torch.inf).amax(-1).masked_fill(~usable, -torch.inf)
        return scores.topk(min(number, scores.shape[1]), dim=1)

    def _places(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Anchor, as the box head takes it, usability and feature of each place."""
        anchors, usable = anchor_boxes(memory) if self.box.reparametrised else anchor_logits(memory)
        return anchors, usable, self.features(memory, usable)

    def features(self, memory: Memory, usable: Bool[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """The feature of each place; all places without a usable anchor share one."""
        known: Tensor = self.norm(self.feature(memory.tokens * usable.unsqueeze(-1)))
        return known

    def scores(self, features: Float[Tensor, "b s d"], tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b s n"]:
        """The logit of every place for every token, or text embedding, of a slot.

        It is factor * (linear layer of the place's feature) . (the category's token) / sqrt(d) + b, and a linear layer
        of the feature alone with `objectness`; or what the category's classifier says.

        The linear layer is applied to the tokens instead of the features (f W . t = f . W^T t): tokens are far fewer.
        """
        if self.classifier is not None:
            pairs: Tensor = self.classifier.all_pairs(features, tokens)
            return pairs
        turned = tokens @ self.category.weight
        shift = (tokens @ self.category.bias).unsqueeze(1)
        logits = (features @ turned.transpose(1, 2) + shift) * self.scale + self.bias
        return logits if self.objectness is None else logits + self.objectness(features)

    def _similarity(self, features: Float[Tensor, "b q d"], tokens: Float[Tensor, "b q c"]) -> Float[Tensor, "b q"]:
        if self.classifier is not None:
            classified: Tensor = self.classifier(features, tokens)
            return classified
        similarity: Tensor = (self.category(features) * tokens).sum(-1)
        logits = similarity * self.scale + self.bias
        return logits if self.objectness is None else logits + self.objectness(features).squeeze(-1)

    @torch.no_grad()
    def _choose(
        self, features: Tensor, usable: Tensor, categories: Categories, number: int, limit: Tensor | None = None
    ) -> "_Pairs":
        """The pairs of `number` queries; `usable` [b s k], or [b s 1], says which there are."""
        if self.config.layout == "shared":
            scores = self.scores(features, categories.tokens).amax(-1).masked_fill(~usable[..., 0], -torch.inf)
            share = max(1, min(number // categories.ids.shape[1], self.config.ceiling, scores.shape[1]))
            best, places = scores.topk(share, dim=1)
            every = categories.ids.shape[1]
            best, places = (repeat(x, "b c -> b k c", k=every) for x in (best, places))
        else:
            tokens = similarity_tokens(categories, self.similarity_config)
            scores = self.scores(features, tokens).masked_fill(~usable, -torch.inf)
            most = min(self.config.ceiling, number, scores.shape[1])
            best, places = rearrange(scores, "b s k -> b k s").topk(most, dim=-1)
        config = self.config.model_copy(update={"number": number})
        priority = share_out(best.float(), categories.valid, config, limit)
        slots, ranks, valid = take_pairs(priority, number)
        places = rearrange(places, "b k c -> b (k c)").gather(1, slots * priority.shape[2] + ranks)
        return _Pairs(places, ranks, slots, valid)


class _Pairs(NamedTuple):
    """The chosen pairs as in `Proposals`."""

    places: Int[Tensor, "b q"]
    ranks: Int[Tensor, "b q"]
    slots: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]


class ClassQueries(nn.Module):
    """Queries of proposals. Content = learned query (by rank in its category's group) + the category's refined token.

    With `content: place` a linear layer of the feature of the query's place is added, without gradient to the feature
    (as in DINO). With `place_only` the feature itself is all the content (as in RT-DETR), with `learned_only` the
    learned query is, with `box_only` the decoder makes the content (`decoder.positions: first`). With `start: shifted`
    a query starts from its proposal's box, moved by a learned shift of its rank.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.config = config
        ranks = config.number if config.layout == "places" else config.ceiling
        self.learned = None if config.content in ("place_only", "box_only") else nn.Embedding(ranks, width)
        self.place = nn.Linear(width, width) if config.content == "place" else None
        self.shift = _no_shifts(ranks) if config.start == "shifted" else None
        self.together = config.attention == "image"

    def forward(self, proposals: Proposals, features: Float[Tensor, "b n d"], categories: Categories) -> Queries:
        """One query for each proposal, or in the layout `places` for each place.

        It starts from the proposal's box, to which no gradient flows back.
        """
        number = features.shape[1]
        if self.config.layout == "places":
            # the pairs of the first slot are the places; all places attend to each other
            valid = rearrange(proposals.valid, "b (k p) -> b k p", p=number).any(1)
            slot = torch.zeros_like(proposals.slot[:, :number])
        else:
            valid, slot = proposals.valid, proposals.slot
        group, rank = torch.zeros_like(slot) if self.together else slot, proposals.rank[:, :number]
        boxes = proposals.boxes[:, :number].detach()
        return Queries(
            content=self._content(rank, slot, features, categories),
            reference_boxes=boxes if self.shift is None else moved(boxes, self.shift(rank).float()),
            slot=slot,
            group=group.masked_fill(~valid, -1),
            valid=valid,
        )

    def _content(self, rank: Tensor, slot: Tensor, features: Tensor, categories: Categories) -> Float[Tensor, "b n d"]:
        if self.config.content == "place_only":
            return features.detach()
        parts = []
        if self.learned is not None:
            parts.append(self.learned(rank))
        if self.config.content in ("learned", "place"):
            parts.append(gather_rows(categories.kept_tokens, slot))
        if self.place is not None:
            parts.append(self.place(features.detach()))
        if not parts:
            return torch.zeros_like(features)
        content: Tensor = sum(parts[1:], parts[0])
        return content


def _no_shifts(number: int) -> nn.Embedding:
    """A shift for each rank, which leaves boxes where they are at the start."""
    shifts = nn.Embedding(number, 4)
    nn.init.zeros_(shifts.weight)
    return shifts


def side_by_side(*parts: Queries) -> Queries:
    """The queries of the first part, then those of the second, and so on. None of them has a learned position."""
    return Queries(
        content=torch.cat([part.content for part in parts], dim=1),
        reference_boxes=torch.cat([part.reference_boxes for part in parts], dim=1),
        slot=torch.cat([part.slot for part in parts], dim=1),
        group=torch.cat([part.group for part in parts], dim=1),
        valid=torch.cat([part.valid for part in parts], dim=1),
    )


def apart(queries: Queries) -> Queries:
    """The same in other groups, so that they see nothing of queries beside them: negative ones, below that of none."""
    return replace(queries, group=(-2 - queries.group).where(queries.valid, -1))


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
        # both sides tensors: ONNX has no number divided by a tensor
        share = (torch.full_like(count, config.number) // count).clamp(min=1)[:, None, None]
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


def anchor_boxes(memory: Memory) -> tuple[Float[Tensor, "b s 4"], Bool[Tensor, "b s"]]:
    """The anchor of every place as a cxcywh box, and whether the place is usable.

    An anchor's centre is that of its cell; its sides are 0.05 of the image on the finest level, and twice as long on
    each coarser level. A place is usable unless it is padding or a coordinate of its anchor is outside (0.01, 0.99).
    """
    centres = cell_centres(memory)
    sides = [centres.new_full((h * w, 2), 0.05 * 2**level) for level, (h, w) in enumerate(memory.level_shapes)]
    anchors = torch.cat([centres, torch.cat(sides).expand_as(centres)], dim=-1)
    usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding_mask
    return anchors, usable


def anchor_logits(memory: Memory) -> tuple[Float[Tensor, "b s 4"], Bool[Tensor, "b s"]]:
    """`anchor_boxes` in logit space; infinite where a place is not usable."""
    anchors, usable = anchor_boxes(memory)
    logits = (anchors / (1 - anchors)).log()
    return logits.masked_fill(~usable.unsqueeze(-1), torch.inf), usable
