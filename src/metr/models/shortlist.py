"""The shortlist: which of thousands of names are worth the category extraction's attention?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.mlp import MLP, FeedForward
from metr.models.config import CategoryConfig
from metr.structures import Memory, Targets

# Vectors that sum an image up; each costs every name one dot product.
_SUMMARIES = 16


class Shortlisted(NamedTuple):
    """The shortlist's logit of every name, and in each image the rows that it takes, in ascending order."""

    logits: Float[Tensor, "b v"]
    rows: Int[Tensor, "b c"]


class Shortlist(nn.Module):
    """Scores every name by a few dot products, and takes the best `config.shortlist` of each image.

    Learned queries look at the memory once; what they see sums the image up in a few vectors. A name's logit is the
    soft maximum over these of vector . projected text / sqrt(d), plus a bias. So nothing is paid for each pair of name
    and place, as category extraction pays.
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

    def forward(
        self, memory: Memory, projected: Float[Tensor, "v d"], targets: Sequence[Targets] | None = None
    ) -> Shortlisted:
        """The logits, in float32 whatever the precision of the network, and the rows that are taken.

        With targets, present names are taken first, then those that something can be learnt of.
        """
        logits = self._logits(memory.once(self, lambda: self._summaries(memory)), projected)
        scores = logits.detach() if targets is None else _asked_first(logits.detach(), targets)
        rows = scores.topk(min(self.number, scores.shape[1]), dim=1).indices
        return Shortlisted(logits, rows.sort(dim=1).values)

    def _summaries(self, memory: Memory) -> Float[Tensor, "b n d"]:
        queries = self.queries.weight.expand(memory.tokens.shape[0], -1, -1)
        allowed = ~memory.padding_mask.unsqueeze(1)
        seen = self.attention(queries, memory.tokens, memory.tokens, allowed)
        summaries: Tensor = self.summary(self.feed_forward(self.norm(seen)))
        return summaries

    def _logits(self, summaries: Float[Tensor, "b n d"], projected: Float[Tensor, "v d"]) -> Float[Tensor, "b v"]:
        # of thousands of names, too many would be equal in fewer digits
        with torch.autocast(summaries.device.type, enabled=False):
            similarity = summaries.float() @ projected.float().T * self.scale
            # the mean of exponentials, not their sum: how many vectors there are makes no name likelier
            return similarity.logsumexp(dim=1) - math.log(_SUMMARIES) + self.bias


def _asked_first(logits: Float[Tensor, "b v"], targets: Sequence[Targets]) -> Float[Tensor, "b v"]:
    """The logits, those of present names lifted above all others; -inf where nothing is known of a name."""
    present, asked = (torch.zeros_like(logits, dtype=torch.bool) for _ in range(2))
    for image, target in enumerate(targets):
        present[image, target.labels] = True
        asked[image] = target.annotated | target.assumed_negatives
    ahead = logits.amax(dim=1, keepdim=True) - logits.amin(dim=1, keepdim=True) + 1
    return (logits + ahead * present).masked_fill(~(asked | present), -torch.inf)
