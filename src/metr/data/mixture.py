"""How draws are shared out among datasets: by their size, and by how hard they are."""

import math
from collections.abc import Mapping

from metr.data.config import BaseMixture, HardnessConfig
from metr.errors import ConfigError, DataError, did_you_mean


def mixture_weights(lengths: Mapping[str, int], mixture: BaseMixture) -> dict[str, float]:
    """The share of draws that goes to each dataset; shares sum to 1.

    Args:
        lengths: Images of each dataset, by name.
        mixture: "proportional" to the images, to their "sqrt", "equal", or a share for each name.

    Raises:
        DataError: a dataset has no image.
        ConfigError: an explicit mixture leaves a dataset out, names an unknown one, is all zero or not finite.
    """
    if empty := [name for name, length in lengths.items() if length == 0]:
        raise DataError("no images in this split", where=", ".join(empty), hint="check the path and the split")
    if not lengths:
        raise DataError("no dataset to draw images from", hint="name at least one dataset")
    if isinstance(mixture, dict):
        if unknown := sorted(mixture.keys() - lengths.keys()):
            hint = did_you_mean(unknown[0], lengths)
            raise ConfigError(f"unknown dataset {unknown[0]!r}", where="mixture", hint=hint)
        if missing := [name for name in lengths if name not in mixture]:
            raise ConfigError(f"no share for {', '.join(missing)}", where="mixture", hint="give every dataset a share")
        shares = {name: mixture[name] for name in lengths}
    else:
        power = {"proportional": 1.0, "sqrt": 0.5, "equal": 0.0}[mixture]
        shares = {name: float(length**power) for name, length in lengths.items()}
    total = sum(shares.values())
    if total <= 0:
        raise ConfigError("every dataset has a share of zero", where="mixture", hint="give one of them a share above 0")
    if not math.isfinite(total):
        raise ConfigError("the shares have no finite sum", where="mixture", hint="write numbers such as 1 and 2")
    return _normalised(shares)


def hardness_weights(
    base: Mapping[str, float], losses: Mapping[str, float], config: HardnessConfig
) -> dict[str, float]:
    """Shares that follow how hard datasets are (Plain-Det, Shi et al., 2024: hardness-indicated sampling).

    A dataset's share in `base` is multiplied by its loss, relative to the others', to the power `config.power`. Of the
    shares that come of it, `config.floor` is given up for those in `base`.

    Args:
        base: The shares if all were equally hard; they sum to 1.
        losses: The mean box loss of each dataset, by name. One that is missing counts as hard as the others on average.
        config: `power` and `floor`.
    """
    known = [losses[name] for name in base if name in losses]
    usual = sum(known) / max(1, len(known))
    hard = {
        name: share * (losses.get(name, usual) / usual) ** config.power for name, share in base.items() if usual > 0
    }
    if sum(hard.values()) <= 0:
        return dict(base)
    hard = _normalised(hard)
    return {name: config.floor * share + (1 - config.floor) * hard[name] for name, share in base.items()}


def _normalised(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}
