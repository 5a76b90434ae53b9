"""A text projection for names that it was not trained with: they are told apart, and all others stay where they are."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Smallest direction of the known names that counts as one, relative to their largest.
_LEAST = 1e-5
# How far small differences between new tokens are blown up, and how hard small free directions are leant on: shares of
# their mean size (squared) that are added to all.
_BLOWN_UP, _LEANT_ON = 0.01, 0.0003


@torch.no_grad()
def decorrelate_names(projection: nn.Linear, known: Float[Tensor, "n t"], new: Float[Tensor, "m t"]) -> None:
    """Changes a projection so that new names lie further from each other, and known ones exactly where they did.

    Names of one field are nearly the same to a language model; where a projection starts, whitening parts them, but a
    trained one must not be begun anew. So the change acts only on directions in which the known names do not extend:
    there the new names are moved to the nearest places that are about equally far apart, and as far as known names are.
    With as many known names as an embedding has numbers, or more, no such direction is left, and nothing changes.

    Args:
        projection: From text embeddings to tokens; changed in place.
        known: The embeddings whose tokens stay, up to rounding.
        new: Those that are moved.
    """
    if len(new) < 2:
        return
    weight = torch.cat([projection.weight, projection.bias.unsqueeze(1)], dim=1).double()
    fixed, moved = (torch.cat([text, torch.ones_like(text[:, :1])], dim=1).to(weight) for text in (known, new))
    _, sizes, directions = torch.linalg.svd(fixed, full_matrices=False)
    basis = directions[sizes > _LEAST * sizes.max()]
    free = moved - moved @ basis.T @ basis
    tokens = moved @ weight.T
    wanted = _apart(tokens, _radius(fixed @ weight.T)) - tokens
    likeness = free @ free.T
    size = likeness.diagonal().mean()
    if size < _LEAST:
        return
    likeness.diagonal().add_(_LEANT_ON * size)
    weight += wanted.T @ torch.linalg.solve(likeness, free)
    projection.weight.copy_(weight[:, :-1])
    projection.bias.copy_(weight[:, -1])


def _apart(tokens: Float[Tensor, "m d"], radius: Float[Tensor, ""]) -> Float[Tensor, "m d"]:
    """The nearest tokens around the same mean whose differences are about at right angles, at least at that radius."""
    mean = tokens.mean(0)
    left, sizes, right = torch.linalg.svd(tokens - mean, full_matrices=False)
    equal = sizes * torch.rsqrt(sizes**2 + _BLOWN_UP * (sizes**2).mean())
    parted: Tensor = (left * equal) @ right
    placed: Tensor = mean + parted * (torch.maximum(radius, _radius(tokens)) / _radius(parted).clamp(min=1e-12))
    return placed


def _radius(tokens: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """How far tokens lie from their mean, in the mean of squares."""
    radius: Tensor = (tokens - tokens.mean(0)).square().sum(1).mean().sqrt()
    return radius
