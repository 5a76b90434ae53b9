"""Which names get a slot when detecting, and how many queries each of them gets."""

from collections.abc import Sequence

import torch

from metr.inference.config import SelectionConfig
from metr.models.config import DetectorConfig
from metr.structures import NameLimits
from metr.text.vocabulary import Vocabulary


def name_limits(
    names: Sequence[str], trained: Vocabulary, model: DetectorConfig, config: SelectionConfig | None = None
) -> NameLimits:
    """The limits of each name that is asked for.

    Args:
        names: What is asked for.
        trained: The names of training, and which dataset has which.
        model: The network's configuration.
        config: What differs from the defaults.
    """
    config = config or SelectionConfig()
    few = config.presence_threshold is None and len(names) <= model.categories.kept
    presence = [0.0] * len(names) if few else presence_thresholds(names, trained, model, config)
    shares = config.trained_queries and model.queries.layout != "places"  # which has no shares
    queries = _trained_queries(trained, model) if shares else {}
    ceiling = model.queries.number if config.most_queries is None else config.most_queries
    most = [min(queries.get(name, ceiling), ceiling) for name in names]
    return NameLimits(presence=torch.tensor(presence), queries=torch.tensor(most))


def presence_thresholds(
    names: Sequence[str], trained: Vocabulary, model: DetectorConfig, config: SelectionConfig | None = None
) -> list[float]:
    """The presence probability from which each name gets a slot where names are more than slots.

    Arguments are those of `name_limits`.
    """
    config = config or SelectionConfig()
    if config.presence_threshold is not None or model.queries.layout == "places":
        return [config.presence_threshold or 0.0] * len(names)
    known = {*trained.names}
    return [model.categories.threshold if name in known else config.untrained_threshold for name in names]


def queries_a_name(names: int, model: DetectorConfig) -> int:
    """The largest number of queries that training gives each name of an image whose dataset has so many names."""
    queries = model.queries
    if queries.layout == "places":
        return queries.number
    if queries.layout == "budget" or queries.varied is not None:
        return min(queries.ceiling, queries.number)
    return max(1, min(queries.ceiling, queries.number // min(model.categories.kept, max(1, names))))


def _trained_queries(trained: Vocabulary, model: DetectorConfig) -> dict[str, int]:
    """How many queries training gave each name: its share of an image whose dataset has the fewest names."""
    most: dict[str, int] = {}
    for names in trained.datasets.values():
        share = queries_a_name(len({*names}), model)
        for name in names:
            most[name] = max(most.get(name, 0), share)
    return most
