"""The category extraction module (CEM): which categories may this image contain?

It begins with the projection of the text embeddings, which can be made once for many images (`ProjectedText`),
initialised so that similar names lie apart (`whitening_projection`), and adapted to new names (`decorrelate_names`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.mlp import FeedForward
from metr.models.category_selection import Shortlist, Shortlisted
from metr.models.config import CategoryConfig
from metr.models.heads import SimilarityHead
from metr.structures import Categories, Memory, Targets

# Singular values below this fraction of the largest count as zero.
_NEGLIGIBLE = 1e-5
# Ridges of `decorrelate_names`, as fractions of the mean square. A smaller first one enlarges small differences between
# new tokens more; a smaller second one brings new tokens closer to their wanted places.
_ENLARGE_RIDGE, _SOLVE_RIDGE = 0.01, 0.0003


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedText:
    """Text embeddings after the network's projection, for use with many images. `Detector.project` makes it.

    Attributes:
        text: The embeddings, which must not be changed in place.
        tokens: Their projection, without gradient.
        weights: Copies of the weights that projected them.
        precision: The lower precision (autocast) in which this was done, if any.
    """

    text: Float[Tensor, "v t"]
    tokens: Float[Tensor, "v d"]
    weights: tuple[Tensor, ...]
    precision: torch.dtype | None

    def still_holds(self, text: Float[Tensor, "_v t"], weights: Sequence[Tensor]) -> bool:
        """Whether projecting `text` with `weights` now would give the same; weights are compared by value."""
        if self.text is not text or self.precision != _autocast_dtype(text.device):
            return False
        return all(torch.equal(ours, now) for ours, now in zip(self.weights, weights, strict=True))


class ExtractionBlock(nn.Module):
    """Category tokens attend to the image, and before that to each other if `config.self_attention` says so."""

    def __init__(self, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads) if config.self_attention else None
        self.among_norm = nn.LayerNorm(width) if config.self_attention else None
        self.attention = Attention(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(self, tokens: Float[Tensor, "b c d"], memory: Memory) -> Float[Tensor, "b c d"]:
        """The category tokens, refined once."""
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
    """Projects text embeddings to category tokens, and refines the tokens by the image, block after block.

    With a shortlist, and more names than it takes, only the names on each image's shortlist go through the blocks.
    """

    def __init__(self, text_width: int, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(text_width, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ExtractionBlock(width, config) for _ in range(config.blocks))
        self.presence = SimilarityHead(width, config.prior)
        self.shortlist = Shortlist(width, config) if config.shortlist else None

    def forward(
        self, memory: Memory, text: Float[Tensor, "v t"] | ProjectedText, targets: Targets | None = None
    ) -> Categories:
        """Presence logits after every block, and the refined tokens. Every category that was looked at has a slot.

        Args:
            memory: The images.
            text: One embedding a category, or what `project` made of them.
            targets: In training only: they train the shortlist, and present categories are shortlisted first.
        """
        embeddings = text.text if isinstance(text, ProjectedText) else text
        projected = text.tokens if isinstance(text, ProjectedText) else self._projected(text)
        batch, vocabulary_size = memory.tokens.shape[0], len(projected)
        shortlisted = self._shortlisted(memory, projected, targets)
        rows = None if shortlisted is None or shortlisted.rows.shape[1] == vocabulary_size else shortlisted.rows
        initial = projected if rows is None else projected[rows]
        tokens = initial.expand(batch, -1, -1)
        logits = []
        for block in self.blocks:
            tokens = block(tokens, memory)
            logits.append(self.presence(tokens, initial))
        presence = torch.stack(logits)
        ids = torch.arange(vocabulary_size, device=projected.device).expand(batch, -1) if rows is None else rows
        return Categories(
            presence_logits=presence if rows is None else _scattered(presence, rows, vocabulary_size),
            text=projected,
            tokens=tokens,
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
            shortlist=rows,
            shortlist_logits=None if shortlisted is None else shortlisted.logits,
            embeddings=embeddings,
        )

    @torch.no_grad()
    def whiten(self, text: Float[Tensor, "v t"], ridge: float) -> None:
        """Sets the text projection so that these names lie apart; for a network that is not trained yet."""
        weight, bias = whitening_projection(text, self.projection.out_features, ridge)
        self.projection.weight.copy_(weight)
        self.projection.bias.copy_(bias)

    @torch.no_grad()
    def project(self, text: Float[Tensor, "v t"], earlier: ProjectedText | None = None) -> ProjectedText:
        """The projected text; `earlier` itself, if its text, weights and precision are still the same."""
        weights = [*self.projection.parameters(), *self.norm.parameters()]
        if earlier is not None and earlier.still_holds(text, weights):
            return earlier
        copies = tuple(weight.detach().clone() for weight in weights)
        precision = _autocast_dtype(text.device)
        return ProjectedText(text=text, tokens=self._projected(text), weights=copies, precision=precision)

    def _projected(self, text: Float[Tensor, "v t"]) -> Float[Tensor, "v d"]:
        projected: Tensor = self.norm(self.projection(text))
        return projected

    def _shortlisted(
        self, memory: Memory, projected: Float[Tensor, "v d"], targets: Targets | None
    ) -> Shortlisted | None:
        """The shortlist; None if the network has none, or if it takes all names and is not trained."""
        if self.shortlist is None or (targets is None and len(projected) <= self.shortlist.number):
            return None
        shortlisted: Shortlisted = self.shortlist(memory, projected, targets)
        return shortlisted


def _scattered(
    logits: Float[Tensor, "e b c"], rows: Int[Tensor, "b c"], vocabulary_size: int
) -> Float[Tensor, "e b v"]:
    """Logits in the rows of the vocabulary; -inf at names that were not looked at."""
    nowhere = logits.new_full((*logits.shape[:2], vocabulary_size), -torch.inf)
    return nowhere.scatter(2, rows.expand(logits.shape), logits)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The lower precision that is in force on a device; None where there is none."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@torch.no_grad()
def whitening_projection(
    text: Float[Tensor, "v t"], width: int, ridge: float
) -> tuple[Float[Tensor, "d t"], Float[Tensor, " d"]]:
    """Weight and bias of a linear layer that subtracts the mean and about equalises variances in all directions.

    A language model embeds the names of one field almost alike: all pieces of a chess set point in one direction.
    After whitening they are nearly orthogonal. Directions in which the names do not differ get the smallest scale, so
    that new names keep their relation to each other.

    Args:
        text: The embeddings.
        width: d. A random rotation (or its first d rows) maps whitened embeddings to tokens.
        ridge: Added to the variance of every direction, in units of the mean variance. The smaller it is, the more
            small differences are enlarged.
    """
    mean = text.mean(0)
    _, sizes, directions = torch.linalg.svd(text - mean, full_matrices=False)
    variance = sizes**2 / len(text)
    scale = (variance + ridge * variance.mean()).clamp(min=1e-12).rsqrt()
    rotation = torch.nn.init.orthogonal_(text.new_empty(width, text.shape[1]))
    weight = scale.min() * rotation + (rotation @ directions.T) * (scale - scale.min()) @ directions
    return weight, -weight @ mean


@torch.no_grad()
def decorrelate_names(projection: nn.Linear, known: Float[Tensor, "n t"], new: Float[Tensor, "m t"]) -> None:
    """Changes a trained text projection in place, so that new names lie apart and known names stay where they are.

    A language model embeds the names of one field almost alike. Whitening separates them before training, but would
    undo what a trained projection has learnt. So this changes the projection only in directions in which the known
    names do not extend. There it moves the new tokens to the nearest places that are about equally far from each
    other, and as far as the known tokens are. If there are as many known names as an embedding has numbers, or more,
    no such direction is left and nothing changes.

    Args:
        projection: From text embeddings to tokens; changed in place.
        known: The embeddings whose tokens stay, up to rounding.
        new: The embeddings whose tokens move.
    """
    if len(new) < 2:
        return
    weight = torch.cat([projection.weight, projection.bias.unsqueeze(1)], dim=1).double()
    fixed, moved = (torch.cat([text, torch.ones_like(text[:, :1])], dim=1).to(weight) for text in (known, new))
    _, sizes, directions = torch.linalg.svd(fixed, full_matrices=False)
    basis = directions[sizes > _NEGLIGIBLE * sizes.max()]
    free = moved - moved @ basis.T @ basis
    tokens = moved @ weight.T
    wanted = _apart(tokens, _radius(fixed @ weight.T)) - tokens
    similarity = free @ free.T
    size = similarity.diagonal().mean()
    if size < _NEGLIGIBLE:
        return
    similarity.diagonal().add_(_SOLVE_RIDGE * size)
    weight += wanted.T @ torch.linalg.solve(similarity, free)
    projection.weight.copy_(weight[:, :-1])
    projection.bias.copy_(weight[:, -1])


def _apart(tokens: Float[Tensor, "m d"], radius: Float[Tensor, ""]) -> Float[Tensor, "m d"]:
    """The nearest tokens with the same mean whose offsets from it are about orthogonal and at least `radius` long."""
    mean = tokens.mean(0)
    left, sizes, right = torch.linalg.svd(tokens - mean, full_matrices=False)
    equal = sizes * torch.rsqrt(sizes**2 + _ENLARGE_RIDGE * (sizes**2).mean())
    parted: Tensor = (left * equal) @ right
    placed: Tensor = mean + parted * (torch.maximum(radius, _radius(tokens)) / _radius(parted).clamp(min=1e-12))
    return placed


def _radius(tokens: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """The root of the mean squared distance of the tokens from their mean."""
    radius: Tensor = (tokens - tokens.mean(0)).square().sum(1).mean().sqrt()
    return radius
