"""What is asked of a completion, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from metr.completion.prelabels import PreLabels
from metr.completion.thresholds import NameThreshold
from metr.data.export import Placement
from metr.errors import ConfigError, did_you_mean
from metr.text.vocabulary import listed_names


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What is completed, besides how (`CompletionConfig`).

    `only` are the names that may be added; empty: all. `given` are thresholds of one's own by name, also of names that
    no dataset annotates. `new` are images without labels, which are labelled in place of the datasets.
    """

    data: tuple[str, ...]
    out: Path
    only: tuple[str, ...] = ()
    given: Mapping[str, float] | None = None
    new: PreLabels | None = None
    placement: Placement = "link"

    @classmethod
    def of(
        cls, data: str | Path | Sequence[str | Path], out: str | Path, more: Mapping[str, Any]
    ) -> "CompletionRequest":
        """A request from one dataset or several, and other fields by name.

        Raises:
            ConfigError: there is no such field, or a name is no text.
        """
        known = [field.name for field in fields(cls) if field.name not in {"data", "out"}]
        if unknown := next((name for name in more if name not in known), None):
            raise ConfigError(f"no option {unknown!r}", where="complete", hint=did_you_mean(unknown, known))
        listed_names(more.get("only", ()))
        listed_names(more.get("given") or ())
        given = [data] if isinstance(data, str | Path) else data
        return cls(data=tuple(map(str, given)), out=Path(out), **more)


@dataclass(frozen=True, kw_only=True)
class CompletedDataset:
    """What became of one dataset: the boxes added by name, its format, and why that is not its own."""

    name: str
    path: str
    format: str
    images: int
    added: Mapping[str, int]
    unread: int = 0
    why_coco: str = ""


@dataclass(frozen=True, kw_only=True)
class CompletionReport:
    """Thresholds of all names, and what became of each dataset."""

    model: str
    thresholds: tuple[NameThreshold, ...]
    datasets: tuple[CompletedDataset, ...]
