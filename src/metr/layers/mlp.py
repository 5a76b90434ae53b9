"""Feed-forward parts."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, as DETR's heads."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        steps: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            steps += [nn.Linear(inner, outer), nn.ReLU()]
        super().__init__(*steps[:-1])

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class FeedForward(nn.Module):
    """Two linear layers around a non-linearity, added to their input and normalised (post-norm)."""

    def __init__(self, width: int, hidden: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.widen = nn.Linear(width, hidden)
        self.activation = activation()
        self.narrow = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The tokens, each changed independently of the others."""
        changed: Tensor = self.norm(tokens + self.narrow(self.activation(self.widen(tokens))))
        return changed
