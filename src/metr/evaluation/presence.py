"""How well the network knows which categories an image shows, before it looks for their boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

DEISSUE_KEPT = (1, 5, 10, 20)


@dataclass(frozen=True, kw_only=True)
class PresenceRecall:
    """Counts that add up over batches: of `pairs` (image, category present in it), `hits[k]` were kept by `k`.

    Kept by `k` means: among the `k` most likely categories of the image.
    """

    pairs: int = 0
    hits: Mapping[int, int] = field(default_factory=dict)

    def __add__(self, other: "PresenceRecall") -> "PresenceRecall":
        """The counts of both."""
        kept = sorted({*self.hits, *other.hits})
        hits = {k: self.hits.get(k, 0) + other.hits.get(k, 0) for k in kept}
        return PresenceRecall(pairs=self.pairs + other.pairs, hits=hits)

    @property
    def shares(self) -> dict[int, float | None]:
        """Recall at each k on the scale 0 to 100; None where nothing was present."""
        return {k: 100 * hits / self.pairs if self.pairs else None for k, hits in self.hits.items()}


def presence_recall(
    logits: Float[Tensor, "b v"], present: Bool[Tensor, "b v"], kept: Sequence[int] = DEISSUE_KEPT
) -> PresenceRecall:
    """Counts which categories that are present stand among the most likely ones.

    Args:
        logits: Presence logits of the last extraction block; of equal ones the earlier row comes first. What is at -inf
            was not shortlisted, and is kept by no number.
        present: Where a category is annotated and has an object.
        kept: The numbers of categories to keep.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)[present]
    possible = ~logits[present].isneginf()
    return PresenceRecall(pairs=rank.numel(), hits={k: int((possible & (rank < k)).sum()) for k in kept})
