"""Which names get a slot when detecting, and how many queries each of them gets."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from metr.config import Config
from metr.models.config import DetectorConfig
from metr.structures import NameLimits
from metr.text.vocabulary import Vocabulary

Probability = Annotated[float, Field(ge=0, le=1)]


class SelectionConfig(Config):
    """Which names get a slot when detecting, and how many queries."""

    presence_threshold: Probability | None = None
    """Smallest presence probability with which a name gets a slot. None: 0 if no more names are asked for than there
    are slots; otherwise `model.categories.threshold` of training, and `untrained_threshold` for untrained names."""
    untrained_threshold: Probability = 0.02
    """`presence_threshold` of names that were not trained, where it is None and names are more than slots."""
    trained_queries: bool = False
    """Whether a trained name gets at most as many queries as its datasets gave it in training. Then images with more
    objects than that lose some."""


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
    least = config.presence_threshold
    if least is None and len(names) <= model.categories.kept:
        least = 0.0
    known = {*trained.names}
    by_name = (model.categories.threshold if name in known else config.untrained_threshold for name in names)
    presence = [least] * len(names) if least is not None else list(by_name)
    queries = _trained_queries(trained, model) if config.trained_queries else {}
    most = [queries.get(name, model.queries.number) for name in names]
    return NameLimits(presence=torch.tensor(presence), queries=torch.tensor(most))


def _trained_queries(trained: Vocabulary, model: DetectorConfig) -> dict[str, int]:
    """How many queries training gave each name: its share of an image whose dataset has the fewest names."""
    queries, slots = model.queries, model.categories.kept
    most: dict[str, int] = {}
    for names in trained.datasets.values():
        share = max(1, min(queries.ceiling, queries.number // min(slots, max(1, len({*names})))))
        for name in names:
            most[name] = max(most.get(name, 0), share)
    return most
