"""Text embeddings that are projected once for many pictures: with thousands of names that is much of the work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedText:
    """What a network makes of text embeddings before it sees a picture. `Detector.project` makes it.

    Attributes:
        text: The embeddings, which must not be changed in place.
        tokens: Their projection, without gradient.
        weights: Copies of the weights that projected them.
        precision: The lower precision (autocast) in which that was done, if any.
    """

    text: Float[Tensor, "v t"]
    tokens: Float[Tensor, "v d"]
    weights: tuple[Tensor, ...]
    precision: torch.dtype | None

    def still_holds(self, text: Float[Tensor, "_v t"], weights: Sequence[Tensor]) -> bool:
        """Whether projecting `text` with `weights` now would give the same; weights are compared by value."""
        if self.text is not text or self.precision != autocast_dtype(text.device):
            return False
        return all(torch.equal(ours, now) for ours, now in zip(self.weights, weights, strict=True))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The lower precision that is in force on a device; None where there is none."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
