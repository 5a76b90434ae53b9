"""The category extraction module (CEM): which categories may this image contain?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.mlp import FeedForward
from metr.models.config import CategoryConfig
from metr.models.heads import SimilarityHead
from metr.models.shortlist import Shortlist, Shortlisted
from metr.models.text_projection import ProjectedText, autocast_dtype, whitening_projection
from metr.structures import Categories, Memory, Targets


class ExtractionBlock(nn.Module):
    """Category tokens look at the image; where the option is on, they look at each other first."""

    def __init__(self, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads) if config.self_attention else None
        self.among_norm = nn.LayerNorm(width) if config.self_attention else None
        self.attention = Attention(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Tokens [b v d], refined once."""
        if self.among is not None and self.among_norm is not None:
            tokens = self.among_norm(tokens + self.among(tokens, tokens, tokens))
        allowed = ~memory.padding_mask.unsqueeze(1)
        keys, values = memory.once(
            self, lambda: (self.attention.key(memory.tokens), self.attention.value(memory.tokens))
        )
        seen = self.attention.gather(tokens, keys, values, allowed)
        refined: Tensor = self.feed_forward(self.norm(tokens + seen))
        return refined


class CategoryExtraction(nn.Module):
    """Projected text embeddings become category tokens, refined by the image block after block.

    With a shortlist, and more names than it takes, only the shortlisted names of each image get that far.
    """

    def __init__(self, text_width: int, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(text_width, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ExtractionBlock(width, config) for _ in range(config.blocks))
        self.presence = SimilarityHead(width, config.prior)
        self.shortlist = Shortlist(width, config) if config.shortlist else None

    def forward(
        self,
        memory: Memory,
        text: Float[Tensor, "v t"] | ProjectedText,
        targets: Sequence[Targets] | None = None,
    ) -> Categories:
        """Presence logits after every block, and refined tokens; every category that was looked at is still kept.

        Args:
            memory: The images.
            text: One embedding a category, or what `project` made of them.
            targets: In training only: they teach the shortlist, and present categories are shortlisted first.
        """
        projected = text.tokens if isinstance(text, ProjectedText) else self._projected(text)
        batch, words = memory.tokens.shape[0], len(projected)
        shortlisted = self._shortlisted(memory, projected, targets)
        rows = None if shortlisted is None or shortlisted.rows.shape[1] == words else shortlisted.rows
        asked = projected if rows is None else projected[rows]
        tokens = asked.expand(batch, -1, -1)
        logits = []
        for block in self.blocks:
            tokens = block(tokens, memory)
            logits.append(self.presence(tokens, asked))
        presence = torch.stack(logits)
        ids = torch.arange(words, device=projected.device).expand(batch, -1) if rows is None else rows
        return Categories(
            presence_logits=presence if rows is None else _spread(presence, rows, words),
            text=projected,
            tokens=tokens,
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
            shortlist=rows,
            shortlist_logits=None if shortlisted is None else shortlisted.logits,
        )

    @torch.no_grad()
    def whiten(self, text: Float[Tensor, "v t"], ridge: float) -> None:
        """Starts the text projection where these names are told apart best; for a network that has not learnt yet."""
        weight, bias = whitening_projection(text, self.projection.out_features, ridge)
        self.projection.weight.copy_(weight)
        self.projection.bias.copy_(bias)

    @torch.no_grad()
    def project(self, text: Float[Tensor, "v t"], earlier: ProjectedText | None = None) -> ProjectedText:
        """The projected text; `earlier` itself, if text, weights and precision are still those that it was made of."""
        weights = [*self.projection.parameters(), *self.norm.parameters()]
        if earlier is not None and earlier.still_holds(text, weights):
            return earlier
        copies = tuple(weight.detach().clone() for weight in weights)
        precision = autocast_dtype(text.device)
        return ProjectedText(text=text, tokens=self._projected(text), weights=copies, precision=precision)

    def _projected(self, text: Float[Tensor, "v t"]) -> Float[Tensor, "v d"]:
        projected: Tensor = self.norm(self.projection(text))
        return projected

    def _shortlisted(
        self, memory: Memory, projected: Float[Tensor, "v d"], targets: Sequence[Targets] | None
    ) -> Shortlisted | None:
        """What the shortlist says, where it has something to take away or to learn."""
        if self.shortlist is None or (targets is None and len(projected) <= self.shortlist.number):
            return None
        shortlisted: Shortlisted = self.shortlist(memory, projected, targets)
        return shortlisted


def _spread(logits: Float[Tensor, "e b c"], rows: Int[Tensor, "b c"], words: int) -> Float[Tensor, "e b v"]:
    """Logits in the vocabulary's rows; -inf for the names that were not looked at."""
    nowhere = logits.new_full((*logits.shape[:2], words), -torch.inf)
    return nowhere.scatter(2, rows.expand(logits.shape), logits)
