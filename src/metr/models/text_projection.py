"""Text embeddings that are projected once for many images: with thousands of names that is much of the work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedText:
    """What a network makes of text embeddings before it sees an image. `Detector.project` makes it.

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


@torch.no_grad()
def whitening_projection(
    text: Float[Tensor, "v t"], width: int, ridge: float
) -> tuple[Float[Tensor, "d t"], Float[Tensor, " d"]]:
    """Weight and bias of a linear layer that takes the mean off the embeddings, and gives their directions one scale.

    Names of one field differ little in a language model's eyes: the embeddings of a chess set's pieces all point one
    way. Whitened, they are nearly at right angles. Directions in which the names do not differ keep the least scale, so
    that new names remain what they are to each other.

    Args:
        text: The embeddings.
        width: d, to which whitened embeddings are brought by a random rotation (or its first d rows).
        ridge: Added to every direction's variance, in units of their mean: how far small differences are blown up.
    """
    mean = text.mean(0)
    _, sizes, directions = torch.linalg.svd(text - mean, full_matrices=False)
    variance = sizes**2 / len(text)
    scale = (variance + ridge * variance.mean()).clamp(min=1e-12).rsqrt()
    rotation = torch.nn.init.orthogonal_(text.new_empty(width, text.shape[1]))
    weight = scale.min() * rotation + (rotation @ directions.T) * (scale - scale.min()) @ directions
    return weight, -weight @ mean


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The lower precision that is in force on a device; None where there is none."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
