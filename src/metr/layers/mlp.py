"""Feed-forward parts."""

from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

Norm = Literal["layer", "rms"]
# added to the mean square in a norm of the root mean square
_RMS_EPS = 1e-6


class MLP(nn.Sequential):
    """Linear layers with an activation between them; with ReLU as DETR's heads."""

    def __init__(self, widths: tuple[int, ...], activation: type[nn.Module] = nn.ReLU) -> None:
        steps: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            steps += [nn.Linear(inner, outer), activation()]
        super().__init__(*steps[:-1])

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


def unit_scale(width: int) -> MLP:
    """Predicts factors of encoded places from tokens of the same width; all of them are 1 at the start."""
    scale = MLP((width, width, width))
    nn.init.zeros_(scale.last.weight)
    nn.init.ones_(scale.last.bias)
    return scale


def activation_named(name: str) -> type[nn.Module]:
    """The activation that a configuration names: `relu` or `prelu`."""
    return {"relu": nn.ReLU, "prelu": nn.PReLU}[name]


class FeedForward(nn.Module):
    """Two linear layers around a non-linearity, added to their input and normalised (post-norm)."""

    def __init__(self, width: int, hidden: int, activation: type[nn.Module] = nn.ReLU, norm: Norm = "layer") -> None:
        super().__init__()
        self.widen = nn.Linear(width, hidden)
        self.activation = activation()
        self.narrow = nn.Linear(hidden, width)
        self.norm = build_norm(width, norm)

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The tokens, each changed independently of the others."""
        changed: Tensor = self.norm(tokens + self.narrow(self.activation(self.widen(tokens))))
        return changed


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): hidden channels times the SiLU of a gate, added to the input and normalised."""

    def __init__(self, width: int, hidden: int, norm: Norm = "layer") -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)
        self.norm = build_norm(width, norm)

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The tokens, each changed independently of the others."""
        changed: Tensor = self.norm(tokens + self.narrow(silu(self.gate(tokens)) * self.widen(tokens)))
        return changed


def build_norm(width: int, kind: Norm) -> nn.Module:
    """A norm of mean and variance, or of the root mean square alone."""
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=_RMS_EPS)
