"""Loading weights into a network, with a report of every key that does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from metr.errors import CheckpointError

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Which keys fitted and which did not; `misshapen` holds the key, the network's shape and the file's."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether every key fitted."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """A few readable lines: how many keys of each kind, and the first of them."""
        shapes = [f"{key}: expected {list(ours)}, found {list(theirs)}" for key, ours, theirs in self.misshapen]
        lines = [
            _listed("of another shape", shapes),
            _listed("missing from the weights", self.missing),
            _listed("unknown to the network", self.unexpected),
        ]
        return "\n".join([f"{len(self.loaded)} weights fit", *filter(None, lines)])


def load_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    strict: bool = True,
    where: object = None,
    hint: str | None = None,
) -> WeightReport:
    """Copies weights into a network, converting them to its precision and device.

    Args:
        network: Receives them.
        weights: By the keys of `network.state_dict()`.
        strict: Refuse, and change nothing, unless all keys and shapes agree; otherwise load those that do.
        where: The file that an error message names.
        hint: What the error message suggests to try; by default what suits a checkpoint.

    Raises:
        CheckpointError: `strict` and some do not fit; the message lists them.
    """
    own = network.state_dict()
    shared = [key for key in own if key in weights]
    report = WeightReport(
        loaded=tuple(key for key in shared if own[key].shape == weights[key].shape),
        missing=tuple(key for key in own if key not in weights),
        unexpected=tuple(key for key in weights if key not in own),
        misshapen=tuple(
            (key, tuple(own[key].shape), tuple(weights[key].shape))
            for key in shared
            if own[key].shape != weights[key].shape
        ),
    )
    if strict and not report.complete:
        raise CheckpointError(f"the weights do not fit the network: {report}", where=where, hint=hint or _hint(report))
    network.load_state_dict({key: weights[key] for key in report.loaded}, strict=False)
    return report


def _listed(kind: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f"\n    ... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"  {len(items)} {kind}:\n    " + "\n    ".join(items[:_SHOWN]) + more


def _hint(report: WeightReport) -> str:
    if report.misshapen:
        return "the checkpoint is of another size or text encoder: build the network from the config.json beside it"
    if not report.loaded:
        return "these are another network's weights: look at the keys, or convert them first"
    return "build the network from the config.json beside the weights"
