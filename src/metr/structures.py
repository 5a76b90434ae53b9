"""The structures that cross module borders. All are frozen; their shapes are executed by the tests.

Axes, the same everywhere: `b` images, `h w` pixels, `s` memory tokens, `l` levels, `d` width, `t` text width,
`v` vocabulary, `c` names an image that category extraction looks at, `k` category slots an image, `q` queries an
image, `n` denoising queries an image, `r` decoder layers, `e` extraction blocks, `m` boxes of one image, `i` ignored
boxes of one image, `p` pairs.

Boxes are `cxcywh`, normalised to 0..1 of the image without its padding, everywhere but in `Detections`, which is
final: `xyxy` in pixels of the image as it was given.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MadeT = TypeVar("_MadeT")
_MovableT = TypeVar("_MovableT", bound="_Movable")


class _Movable:
    """Moves every tensor of a structure, nested ones included."""

    def to(self: _MovableT, device: torch.device | str, non_blocking: bool = False) -> _MovableT:
        """The same structure with its tensors on `device`."""
        moved = {f.name: _moved(getattr(self, f.name), device, non_blocking) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]


def _moved(value: object, device: torch.device | str, non_blocking: bool) -> object:
    if isinstance(value, Tensor | _Movable):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, tuple):
        return tuple(_moved(item, device, non_blocking) for item in value)
    return value


@dataclass(frozen=True, kw_only=True)
class Targets(_Movable):
    """What is known of one image.

    `labels` and `ignore_labels` are rows of the text embeddings that the network is given. `annotated[v]` is True where
    "no box" means "none there"; elsewhere it is unknown and gives no loss, unless `assumed_negative[v]` says that none
    is taken to be there. Nobody looked, then: it teaches what images may contain, not what boxes hold. Crowds and
    group-of boxes are `ignore_boxes`: neither objects to find nor mistakes to find.
    """

    boxes: Float[Tensor, "m 4"]
    labels: Int[Tensor, "m"]
    annotated: Bool[Tensor, "v"]
    ignore_boxes: Float[Tensor, "i 4"]
    ignore_labels: Int[Tensor, "i"]
    assumed_negative: Bool[Tensor, "v"] | None = None

    @property
    def assumed_negatives(self) -> Bool[Tensor, "v"]:
        """`assumed_negative`; of nothing, where it is not given."""
        return torch.zeros_like(self.annotated) if self.assumed_negative is None else self.assumed_negative


@dataclass(frozen=True, kw_only=True)
class Batch(_Movable):
    """Images of one step, padded at the right and bottom to one shape.

    `images` are RGB in 0..1 (each backbone normalises for itself); `padding_mask` is True on padding;
    `original_sizes` are (height, width) in pixels of the images as stored; `sizes` the same after transforms,
    before padding.
    """

    images: Float[Tensor, "b 3 h w"]
    padding_mask: Bool[Tensor, "b h w"]
    targets: tuple[Targets, ...]
    image_ids: tuple[int | str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    datasets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Memory(_Movable):
    """Image tokens of all levels, finest first, each level row by row.

    `valid_ratios[b l 2]` is the (x, y) share of each level that is image rather than padding.
    """

    tokens: Float[Tensor, "b s d"]
    padding_mask: Bool[Tensor, "b s"]
    level_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Float[Tensor, "b l 2"]

    @cached_property
    def _made(self) -> dict[object, Any]:
        return {}

    def once(self, module: object, make: Callable[[], _MadeT]) -> _MadeT:
        """What a module makes of the memory alone: made once, however many vocabularies the memory is asked about."""
        if module not in self._made:
            self._made[module] = make()
        made: _MadeT = self._made[module]
        return made


@dataclass(frozen=True, kw_only=True)
class Categories(_Movable):
    """What the category extraction module says of each image, and which categories it keeps.

    `text` is the projected vocabulary, `tokens` the same refined by the image: all of it, or of each image the rows
    `shortlist` (ascending). What is not shortlisted was not looked at: its presence logits are -inf, and it is never
    kept; where a shortlist was asked, `shortlist_logits` are what it says of every name. `ids[b k]` are rows of the
    vocabulary in ascending order; slots with `valid` False are empty (their id is 0 and means nothing).
    """

    presence_logits: Float[Tensor, "e b v"]
    text: Float[Tensor, "v d"]
    tokens: Float[Tensor, "b c d"]
    ids: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]
    shortlist: Int[Tensor, "b c"] | None = None
    shortlist_logits: Float[Tensor, "b v"] | None = None

    @property
    def kept_tokens(self) -> Float[Tensor, "b k d"]:
        """The refined tokens of the kept categories."""
        # an empty slot's id is 0, and finds some token as well
        places = self.ids if self.shortlist is None else torch.searchsorted(self.shortlist, self.ids)
        index = places.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1])
        return self.tokens.gather(1, index)


@dataclass(frozen=True, kw_only=True)
class Proposals(_Movable):
    """The chosen (category, place) pairs, one for each query; `place` is an index of memory tokens."""

    logits: Float[Tensor, "b q"]
    boxes: Float[Tensor, "b q 4"]
    place: Int[Tensor, "b q"]
    slot: Int[Tensor, "b q"]
    rank: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]


@dataclass(frozen=True, kw_only=True)
class Queries(_Movable):
    """What the decoder refines. Queries attend to each other only inside one `group`; each looks for one `slot`."""

    content: Float[Tensor, "b q d"]
    reference_boxes: Float[Tensor, "b q 4"]
    slot: Int[Tensor, "b q"]
    group: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]


@dataclass(frozen=True, kw_only=True)
class DenoisingPlan(_Movable):
    """What each denoising query must answer: object `target` of its image if `positive`, else "no"."""

    slot: Int[Tensor, "b n"]
    target: Int[Tensor, "b n"]
    positive: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]


@dataclass(frozen=True, kw_only=True)
class DenoisingOutput(_Movable):
    """The decoder's answers to the denoising queries, one for each layer, with the plan they are judged by."""

    logits: Float[Tensor, "r b n"]
    boxes: Float[Tensor, "r b n 4"]
    plan: DenoisingPlan


@dataclass(frozen=True, kw_only=True)
class DetectorOutput(_Movable):
    """The network's answer: one logit and one box (cxcywh, 0..1) a query and decoder layer, last layer last."""

    logits: Float[Tensor, "r b q"]
    boxes: Float[Tensor, "r b q 4"]
    slot: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]
    categories: Categories
    proposals: Proposals
    denoising: DenoisingOutput | None = None


@dataclass(frozen=True, kw_only=True)
class Matches(_Movable):
    """Which query answers for which object: `target` counts within its image. Layer 0 is the proposals."""

    layer: Int[Tensor, "p"]
    image: Int[Tensor, "p"]
    query: Int[Tensor, "p"]
    target: Int[Tensor, "p"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Named loss terms, already weighted; the total is their sum, so a misspelt name can drop nothing."""

    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The number to minimise."""
        return torch.stack(list(self.terms.values())).sum()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every term."""
        yield from self.terms.items()


@dataclass(frozen=True, kw_only=True)
class Detections(_Movable):
    """Final detections of one image, best first: `boxes` xyxy in pixels, `scores` in 0..1, `labels` rows of `names`."""

    boxes: Float[Tensor, "q 4"]
    scores: Float[Tensor, "q"]
    labels: Int[Tensor, "q"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return self.scores.shape[0]

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`, for its trackers, zones and annotators (the extra `supervision`).

        Raises:
            ImportError: supervision is not installed.
        """
        from supervision import Detections as TheirDetections

        labels = self.labels.cpu().numpy()
        return TheirDetections(
            xyxy=self.boxes.cpu().numpy(),
            confidence=self.scores.cpu().numpy(),
            class_id=labels,
            data={"class_name": np.array([self.names[label] for label in labels.tolist()], dtype=str)},
        )
