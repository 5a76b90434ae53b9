"""The structures that cross module borders. All are frozen, and the tests check their shapes.

Axes: `b` images, `h w` pixels, `s` memory tokens, `l` levels, `d` width, `t` text width,
`v` vocabulary, `c` names of the vocabulary that category extraction looks at, `k` category slots an image, `q` queries
an image, `n` denoising queries an image, `r` decoder layers, `e` extraction blocks, `m` objects of one image, `i`
ignored boxes of one image, `p` (query, object) pairs.

Boxes are `cxcywh` in 0..1 of the image without its padding. Only `Detections` differ: `xyxy` in pixels of the image as
it was given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_OBJECT = -1
"""A label or an object's index that stands for none: a row of padding, or a query without an object."""

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
    """What is known of the images of a batch. `stack` pads the targets of single images to one shape.

    `labels` and `ignore_labels` are rows of the text embeddings that the network is given; rows of padding have the
    label `NO_OBJECT` and may stand anywhere among the objects. Crowds and group-of boxes are `ignore_boxes`: detecting
    them is neither right nor wrong.

    `annotated[b, v]` says that category v is annotated exhaustively in image b: each of its objects has a box.
    Other categories give no loss, unless `assumed_negative[b, v]` says that category v is assumed to be absent. Then
    its presence logit is trained as a negative and, if it has a slot, the logits of its queries are too.

    `noise_seeds` has a number for each image, from which the noise of its denoising queries is drawn; where it is
    empty, torch's own generator draws.
    """

    boxes: Float[Tensor, "b m 4"]
    labels: Int[Tensor, "b m"]
    ignore_boxes: Float[Tensor, "b i 4"]
    ignore_labels: Int[Tensor, "b i"]
    annotated: Bool[Tensor, "b v"]
    assumed_negative: Bool[Tensor, "b v"]
    noise_seeds: tuple[int, ...] = ()

    @staticmethod
    def stack(parts: Sequence["Targets"]) -> "Targets":
        """The targets of several images (or batches) as those of one batch, padded to the most objects of an image."""
        return Targets(
            boxes=_padded([part.boxes for part in parts], 0.5),
            labels=_padded([part.labels for part in parts], NO_OBJECT),
            ignore_boxes=_padded([part.ignore_boxes for part in parts], 0.5),
            ignore_labels=_padded([part.ignore_labels for part in parts], NO_OBJECT),
            annotated=torch.cat([part.annotated for part in parts]),
            assumed_negative=torch.cat([part.assumed_negative for part in parts]),
            noise_seeds=tuple(seed for part in parts for seed in part.noise_seeds),
        )

    @property
    def is_object(self) -> Bool[Tensor, "b m"]:
        """True at objects, False at padding."""
        return self.labels != NO_OBJECT

    @cached_property
    def present(self) -> Bool[Tensor, "b v"]:
        """The categories that have an object in the image."""
        return self._categories_of(self.labels)

    @cached_property
    def ignored(self) -> Bool[Tensor, "b v"]:
        """The categories that have an ignored box in the image."""
        return self._categories_of(self.ignore_labels)

    @cached_property
    def absent(self) -> Bool[Tensor, "b v"]:
        """The categories that are known or assumed to be absent: neither an object nor an ignored box is there."""
        return (self.annotated | self.assumed_negative) & ~self.present & ~self.ignored

    def boxes_of(self, target: Int[Tensor, "r b q"]) -> Float[Tensor, "r b q 4"]:
        """The boxes of objects by their index in the image; arbitrary ones for `NO_OBJECT`."""
        boxes = self.boxes if self.boxes.shape[1] else self.boxes.new_full((len(self.boxes), 1, 4), 0.5)
        image = torch.arange(len(boxes), device=boxes.device).unsqueeze(-1)
        return boxes[image, target.clamp(min=0)]

    def _categories_of(self, labels: Int[Tensor, "b n"]) -> Bool[Tensor, "b v"]:
        images, vocabulary_size = self.annotated.shape
        # padding is marked in one more column, which is cut off
        mask = self.annotated.new_zeros(images, vocabulary_size + 1)
        return mask.scatter(1, labels.where(labels != NO_OBJECT, vocabulary_size), True)[:, :vocabulary_size]


def _padded(parts: Sequence[Tensor], value: int | float) -> Tensor:
    """Tensors [b n ...] as one [sum of b, longest n, ...], filled up with `value`."""
    longest = max(part.shape[1] for part in parts)
    rows = parts[0].new_full((sum(map(len, parts)), longest, *parts[0].shape[2:]), value)
    for row, image in zip(rows, (image for part in parts for image in part), strict=True):
        row[: len(image)] = image
    return rows


@dataclass(frozen=True, kw_only=True)
class Batch(_Movable):
    """Images of one step, padded at the right and bottom to one shape.

    `images` are RGB in 0..1 (each backbone normalises for itself); `padding_mask` is True on padding;
    `original_sizes` are (height, width) in pixels of the images as stored; `sizes` the same after transforms,
    before padding.
    """

    images: Float[Tensor, "b 3 h w"]
    padding_mask: Bool[Tensor, "b h w"]
    targets: Targets
    image_ids: tuple[int | str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    datasets: tuple[str, ...]

    @property
    def image_names(self) -> tuple[str, ...]:
        """The dataset and the id of each image."""
        return tuple(f"{name} {one}" for name, one in zip(self.datasets, self.image_ids, strict=True))


@dataclass(frozen=True, kw_only=True)
class Memory(_Movable):
    """Image tokens of all levels, finest level first, each level row by row.

    `valid_ratios[b l 2]` is the fraction of each level, in x and in y, that is image and not padding.
    """

    tokens: Float[Tensor, "b s d"]
    padding_mask: Bool[Tensor, "b s"]
    level_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Float[Tensor, "b l 2"]

    @cached_property
    def _made(self) -> dict[object, Any]:
        return {}

    def once(self, module: object, make: Callable[[], _MadeT]) -> _MadeT:
        """`make()`, computed from this memory alone. Cached for each module unless gradients are enabled.

        Compiled code caches nothing: a compiler sees to repeated work itself, and cannot keep what outlives its graph.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if module not in self._made:
            self._made[module] = make()
        made: _MadeT = self._made[module]
        return made


@dataclass(frozen=True, kw_only=True)
class Categories(_Movable):
    """What category extraction says of each image, and which categories get a slot.

    `text` is the projected vocabulary, `embeddings` what it was projected from. `tokens` are the projected ones,
    refined by the image: for the whole vocabulary (c = v), or only for the rows that `shortlist` lists for each image
    in ascending order. Names that are not on the shortlist were not looked at: their presence logits are -inf, and
    they never get a slot. `shortlist_logits` are the logits by which the shortlist chose; None where no shortlist was
    made.

    `ids` are the rows of the vocabulary that have a slot, ascending. Slots that are not `valid` are empty; their id
    is 0 and means nothing.
    """

    presence_logits: Float[Tensor, "e b v"]
    text: Float[Tensor, "v d"]
    tokens: Float[Tensor, "b c d"]
    ids: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]
    shortlist: Int[Tensor, "b c"] | None = None
    shortlist_logits: Float[Tensor, "b v"] | None = None
    embeddings: Float[Tensor, "v t"] | None = None

    @property
    def kept_tokens(self) -> Float[Tensor, "b k d"]:
        """The refined tokens of the categories in the slots; arbitrary ones for empty slots."""
        if self.shortlist is None:
            return gather_rows(self.tokens, self.ids)
        # what searchsorted gives, which ONNX has not
        places = (self.shortlist.unsqueeze(1) < self.ids.unsqueeze(2)).sum(dim=2)
        return gather_rows(self.tokens, places)


@dataclass(frozen=True, kw_only=True)
class NameLimits(_Movable):
    """Limits of each name when detecting.

    `presence` is the smallest presence probability with which the name gets a slot, `queries` the largest number of
    queries that it gets in an image.
    """

    presence: Float[Tensor, "v"]
    queries: Int[Tensor, "v"]


def gather_rows(table: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The rows of each image's table that `index` names."""
    return table.gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class Proposals(_Movable):
    """The chosen (category, place) pairs, one for each answer of the network.

    `place` is the index of a memory token, `slot` the category's slot, and `rank` the position of the place among the
    best places of its category.
    """

    logits: Float[Tensor, "b q"]
    boxes: Float[Tensor, "b q 4"]
    place: Int[Tensor, "b q"]
    slot: Int[Tensor, "b q"]
    rank: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]


@dataclass(frozen=True, kw_only=True)
class Queries(_Movable):
    """What the decoder refines. A query detects the category in its `slot`; it attends to queries of its `group`.

    In the layout `places` a query stands for a place, at which every category with a slot is asked: `slot` is 0 and
    means nothing. `position` is learned; None where the decoder makes it of the box.
    """

    content: Float[Tensor, "b q d"]
    reference_boxes: Float[Tensor, "b q 4"]
    slot: Int[Tensor, "b q"]
    group: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]
    position: Float[Tensor, "b q d"] | None = None


@dataclass(frozen=True, kw_only=True)
class Decoded(_Movable):
    """What the decoder found for each query after each layer, before any category is compared with it.

    `quality` is a logit that is added to the logits of all categories; None where the decoder predicts none.
    """

    features: Float[Tensor, "r b q d"]
    boxes: Float[Tensor, "r b q 4"]
    quality: Float[Tensor, "r b q"] | None = None

    def rows(self, first: int, last: int | None = None) -> "Decoded":
        """Those of the queries `first` to `last`, which is left out."""
        quality = None if self.quality is None else self.quality[:, :, first:last]
        return Decoded(features=self.features[:, :, first:last], boxes=self.boxes[:, :, first:last], quality=quality)

    def split(self, numbers: Sequence[int]) -> Iterator["Decoded"]:
        """Those of the first queries, as many as the first number says, then those of the next."""
        ends = [*accumulate(numbers)]
        return (self.rows(end - number, end) for number, end in zip(numbers, ends, strict=True))


@dataclass(frozen=True, kw_only=True)
class DenoisingPlan(_Movable):
    """What each denoising query should predict: object `target` of its image if `positive`, otherwise "no object"."""

    slot: Int[Tensor, "b n"]
    target: Int[Tensor, "b n"]
    positive: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]


@dataclass(frozen=True, kw_only=True)
class DenoisingOutput(_Movable):
    """The decoder's predictions for the denoising queries after each layer, and what they should have been."""

    logits: Float[Tensor, "r b n"]
    boxes: Float[Tensor, "r b n 4"]
    plan: DenoisingPlan


@dataclass(frozen=True, kw_only=True)
class OneToManyOutput(_Movable):
    """The decoder's predictions for further queries, in training only, after each layer.

    `repeats` is how many of them are matched to an object. `slot` and `valid` are as in `DetectorOutput`.
    """

    logits: Float[Tensor, "r b n"]
    boxes: Float[Tensor, "r b n 4"]
    slot: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    repeats: int


@dataclass(frozen=True, kw_only=True)
class DetectorOutput(_Movable):
    """The network's predictions: one logit and one box for each query after each decoder layer, last layer last.

    `proposals` is None where the places of queries are learned. `denoising` and `one_to_many` are there in training.
    """

    logits: Float[Tensor, "r b q"]
    boxes: Float[Tensor, "r b q 4"]
    slot: Int[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]
    categories: Categories
    proposals: Proposals | None
    denoising: DenoisingOutput | None = None
    one_to_many: OneToManyOutput | None = None


@dataclass(frozen=True, kw_only=True)
class Matches(_Movable):
    """Which query is matched to which object, one row a pair.

    `target` is the object's index in its image. Layer 0 is the proposals, layer j + 1 is decoder layer j;
    without proposals layer j is decoder layer j.
    """

    layer: Int[Tensor, "p"]
    image: Int[Tensor, "p"]
    query: Int[Tensor, "p"]
    target: Int[Tensor, "p"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Named loss terms, already weighted. The total is the sum of all terms, whatever their names."""

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
