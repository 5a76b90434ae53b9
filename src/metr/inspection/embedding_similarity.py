"""Names compared by their meaning, as a language model has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from torch import Tensor

from metr.data.datasets_file import DatasetSource
from metr.text.encoder import TextEncoder, TextEncoderConfig
from metr.text.vocabulary import Vocabulary

# Names whose similarities are computed at once.
_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class EmbeddingSimilarity:
    """Text embeddings of names; `source` says by which language model."""

    source: str
    names: tuple[str, ...]
    vectors: Float[Tensor, "v t"]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def between(self, first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, "a b"]:
        """The similarity of each name of `first` with each of `second`."""
        one, two = (self.vectors[[self._rows[name] for name in names]] for names in (first, second))
        return np.asarray((one @ two.T).numpy())

    def similarity(self, first: str, second: str) -> float:
        """The similarity of two names."""
        return float(self.vectors[self._rows[first]] @ self.vectors[self._rows[second]])

    def pairs(self, least: float) -> list[tuple[str, str, float]]:
        """Every two names of at least this similarity, in the order of `names`."""
        found = []
        for start in range(0, len(self.names), _ROWS):
            block = np.asarray((self.vectors[start : start + _ROWS] @ self.vectors.T).numpy())
            rows, columns = np.nonzero(block >= least)
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                if start + row < column:
                    found.append((self.names[start + row], self.names[column], float(block[row, column])))
        return found


def joint_vocabulary(sources: Sequence[DatasetSource]) -> Vocabulary:
    """All names with their prompts; where datasets prompt one name differently, the first one's counts."""
    names = dict.fromkeys(name for source in sources for name in source.categories)
    prompts: dict[str, str] = {}
    for source in sources:
        for name, prompt in source.config.prompts.items():
            prompts.setdefault(name, prompt)
    return Vocabulary.of(tuple(names), prompts)


def meanings_of(vocabulary: Vocabulary, config: TextEncoderConfig) -> EmbeddingSimilarity:
    """Embeds names, their prompts in their stead.

    Raises:
        ModelError: the language model cannot be found.
        DependencyError: the bundled one is not installed.
    """
    return EmbeddingSimilarity(
        source=config.source, names=vocabulary.names, vectors=TextEncoder(config).embed(vocabulary)
    )


def owners_of(sources: Sequence[DatasetSource]) -> Mapping[str, tuple[str, ...]]:
    """The datasets that annotate each name."""
    owners: dict[str, list[str]] = {}
    for source in sources:
        for name in source.categories:
            owners.setdefault(name, []).append(source.name)
    return {name: tuple(datasets) for name, datasets in owners.items()}
