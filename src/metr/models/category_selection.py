"""Which categories are worth a closer look, and which get a slot.

With thousands of names a shortlist chooses the ones that category extraction looks at; `select_categories` then gives
slots to the most likely ones.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.mlp import MLP, FeedForward
from metr.models.config import CategoryConfig, DetectorConfig
from metr.structures import Categories, Memory, NameLimits, Targets

# Tells the random numbers of group sizes from those of denoising.
_SIZES = 0x517E
# Vectors that sum an image up; each costs every name one dot product.
_SUMMARIES = 16


class Shortlisted(NamedTuple):
    """The shortlist's logit of every name, and the rows that it takes for each image, in ascending order."""

    logits: Float[Tensor, "b v"]
    rows: Int[Tensor, "b c"]


class Shortlist(nn.Module):
    """Scores every name with a few dot products and takes the best `config.shortlist` names of each image.

    Learned queries attend to the memory once, and so sum the image up in a few vectors. A name's logit is the soft
    maximum over these of vector . projected text / sqrt(d), plus a bias. The cost grows with the number of names and
    with the number of places, but not with their product as in category extraction.
    """

    def __init__(self, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.number = config.shortlist
        self.queries = nn.Embedding(_SUMMARIES, width)
        self.attention = Attention(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)
        self.summary = MLP((width, width, width))
        self.bias = nn.Parameter(torch.tensor([math.log(config.prior / (1 - config.prior))]))
        self.scale = 1 / math.sqrt(width)

    def forward(self, memory: Memory, projected: Float[Tensor, "v d"], targets: Targets | None = None) -> Shortlisted:
        """The logits, in float32 whatever the precision of the network, and the rows that are taken.

        With targets, present names are taken first, then names that are annotated or assumed to be absent.
        """
        logits = self._logits(memory.once(self, lambda: self._summaries(memory)), projected)
        scores = logits.detach()
        if targets is not None:
            supervised = targets.present | targets.annotated | targets.assumed_negative
            scores = _present_first(scores, targets.present).masked_fill(~supervised, -torch.inf)
        rows = scores.topk(min(self.number, scores.shape[1]), dim=1).indices
        return Shortlisted(logits, rows.sort(dim=1).values)

    def _summaries(self, memory: Memory) -> Float[Tensor, "b n d"]:
        queries = self.queries.weight.expand(memory.tokens.shape[0], -1, -1)
        allowed = ~memory.padding_mask.unsqueeze(1)
        seen = self.attention(queries, memory.tokens, memory.tokens, allowed)
        summaries: Tensor = self.summary(self.feed_forward(self.norm(seen)))
        return summaries

    def _logits(self, summaries: Float[Tensor, "b n d"], projected: Float[Tensor, "v d"]) -> Float[Tensor, "b v"]:
        # In lower precision many of the thousands of logits would tie.
        with torch.autocast(summaries.device.type, enabled=False):
            similarity = summaries.float() @ projected.float().T * self.scale
            # The mean of the exponentials, not their sum: logits do not grow with the number of vectors.
            return similarity.logsumexp(dim=1) - math.log(_SUMMARIES) + self.bias


@torch.no_grad()
def drawn_sizes(targets: Targets | None, config: DetectorConfig) -> Int[Tensor, "b"] | None:
    """How many queries each name of an image gets in this step; None where that is not drawn (`queries.varied`).

    An image's number follows from its own seed where there are seeds. It is drawn from the range, evenly on a
    logarithmic scale. Then it is raised to the most objects of a name in the image, as far as the ceiling allows, and
    lowered to what all names with objects can have.
    """
    queries = config.queries
    if targets is None or queries.varied is None:
        return None
    images, vocabulary_size = targets.annotated.shape
    low, high = (math.log(bound) for bound in (queries.varied[0], queries.varied[1] + 1))
    drawn = (low + _lots(targets) * (high - low)).exp().floor().long().clamp(max=queries.varied[1])
    counts = torch.zeros(images, vocabulary_size + 1, dtype=torch.int64, device=drawn.device)
    labels = targets.labels.where(targets.is_object, vocabulary_size)
    counts = counts.scatter_add(1, labels, torch.ones_like(labels))[:, :vocabulary_size]
    present = (counts > 0).sum(1).clamp(1, config.categories.kept)
    wanted = torch.maximum(drawn, counts.amax(1).clamp(max=queries.ceiling))
    return torch.minimum(wanted, (queries.number // present).clamp(min=1))


def _lots(targets: Targets) -> Float[Tensor, "b"]:
    """A random number in 0..1 for each image, on the device of the targets."""
    if not targets.noise_seeds:
        return torch.rand(len(targets.boxes), device=targets.boxes.device)
    # of another stream than the noise, which begins with the seed itself
    generators = [torch.Generator().manual_seed(seed ^ _SIZES) for seed in targets.noise_seeds]
    lots = torch.cat([torch.rand(1, generator=one) for one in generators])
    return lots.to(targets.boxes.device, non_blocking=True)


def select_categories(
    categories: Categories,
    config: DetectorConfig,
    targets: Targets | None = None,
    limits: NameLimits | None = None,
    sizes: Int[Tensor, "b"] | None = None,
) -> Categories:
    """The categories with at most `categories.kept` slots an image, in ascending order of their ids, empty slots last.

    Without targets, a category takes no slot if its presence probability is below that of its `limits`, or below
    `categories.threshold` if there are none; in the layout `places` any number has slots. With targets,
    present categories come first, then the most likely ones that are annotated; categories that are assumed to be
    absent take at most `categories.negative_slots` slots; other categories give no loss and take none. Where the
    `sizes` of their groups are drawn, only as many categories have slots as fit in all queries.
    """
    scores, own, kept = categories.presence_logits[-1].detach().float(), config.categories, config.categories.kept
    if targets is None:
        kept = scores.shape[1] if config.queries.layout == "places" else kept
        least = own.threshold if limits is None else limits.presence
        scores = scores.masked_fill(scores.sigmoid() < least, -torch.inf)
    else:
        allowed = targets.annotated | targets.present
        if own.negative_slots:
            candidates = targets.assumed_negative & ~allowed
            allowed = allowed | _best(scores.masked_fill(~candidates, -torch.inf), own.negative_slots)
        scores = _present_first(scores, targets.present).masked_fill(~allowed, -torch.inf)
    best, ids = scores.topk(min(kept, scores.shape[1]), dim=1)
    valid = best > -torch.inf
    if sizes is not None:
        valid = valid & (torch.arange(valid.shape[1], device=valid.device) < (config.queries.number // sizes)[:, None])
    order = ids.masked_fill(~valid, scores.shape[1]).argsort(dim=1)
    valid = valid.gather(1, order)
    return replace(categories, ids=ids.gather(1, order).masked_fill(~valid, 0), valid=valid)


def _present_first(scores: Float[Tensor, "b v"], present: Bool[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """The scores with those of present categories raised above all others. Scores of -inf stay."""
    lowest = scores.masked_fill(scores.isneginf(), torch.inf).amin(dim=1, keepdim=True)
    ahead = scores.amax(dim=1, keepdim=True) - lowest + 1
    return scores + ahead * present


def _best(scores: Float[Tensor, "b v"], number: int) -> Bool[Tensor, "b v"]:
    """True at the `number` highest finite scores of each image."""
    best, index = scores.topk(min(number, scores.shape[1]), dim=1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, best > -torch.inf)
