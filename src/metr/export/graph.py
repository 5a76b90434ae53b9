"""What is exported: a network with all that detection does before and after it, as one function of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.boxes import area
from metr.data.collate import padded_shape
from metr.data.config import ResizeConfig
from metr.errors import ModelError
from metr.export.folding import folded
from metr.inference.postprocess import candidates
from metr.inference.predictor import Predictor
from metr.models.category_extraction import ProjectedText
from metr.models.category_selection import Shortlist, Shortlisted
from metr.models.detector import Detector
from metr.structures import Memory, NameLimits, Targets

OUTPUTS = ("boxes", "scores", "labels")
NOT_FOUND = -1.0
"""The score of rows that are no detections."""
NO_NAME = 2.0
"""The presence threshold of rows of text that are no names: none reaches it."""
Answer = tuple[Float[Tensor, "b q 4"], Float[Tensor, "b q"], Int[Tensor, "b q"]]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What goes into a graph.

    `shape` is (height, width) of images in pixels where all have one shape, padded; None where it is free, in multiples
    of `multiple`, and the input `sizes` says how much of it is image. `names` is the number of rows of the inputs
    `text` and `presence`; None where names are constants of the graph.
    """

    pixels: str
    multiple: int
    shape: tuple[int, int] | None = None
    names: int | None = None
    text_width: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in their order."""
        sizes = () if self.shape is not None else ("sizes",)
        return ("images", *sizes, *(() if self.names is None else ("text", "presence")))


class ExportedDetector(nn.Module):
    """A network as a function of images, whose names are constants or inputs. It is made for export alone.

    Args:
        predictor: Network, names, their embeddings and limits, and how it detects.
        interface: What goes in.
    """

    text: Tensor
    tokens: Tensor
    presence: Tensor
    queries: Tensor

    def __init__(self, predictor: Predictor, interface: Interface) -> None:
        super().__init__()
        assert isinstance(predictor.network, Detector)
        assert predictor.limits is not None
        self.interface = interface
        self.presence_power = predictor.config.postprocess.presence_power
        self.size = fixed_size(predictor.resize)
        self.network = folded(predictor.network, padded=self.size is None or self.size != interface.shape)
        if interface.names is None:
            projected = self.network.project(predictor.text.cpu())
            self.register_buffer("text", projected.text)
            self.register_buffer("tokens", projected.tokens)
            self.register_buffer("presence", predictor.limits.presence.cpu())
            self.register_buffer("queries", predictor.limits.queries.cpu())
        else:
            self._open(interface.names)

    def forward(self, images: Tensor, *others: Tensor) -> Answer:
        """Boxes (xyxy in 0..1 of the image), scores and labels of all queries, best first; score -1: no detection.

        Args:
            images: RGB [b 3 h w], padded at the right and bottom.
            others: What `Interface.inputs` names further: sizes [b 2] (height, width in pixels), text [n t], presence
                [n], the least presence probability of each name (2 for rows that are no names).
        """
        given = dict(zip(self.interface.inputs, (images, *others), strict=True))
        pixels = images.to(torch.float32) / 255 if self.interface.pixels == "uint8" else images
        memory = self.network.encode(pixels, self._padding(pixels, given.get("sizes")))
        text, limits = self._names(given)
        output = self.network.detect(memory, text, limits=limits)
        boxes, scores, labels, keep = candidates(output, self.presence_power)
        keep = keep & (area(boxes) > 0)
        scores = scores.masked_fill(~keep, NOT_FOUND)
        scores, order = scores.topk(scores.shape[1], dim=1)
        return boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)), scores, labels.gather(1, order)

    def _padding(self, pixels: Float[Tensor, "b 3 h w"], sizes: Tensor | None) -> Bool[Tensor, "b h w"]:
        height, width = pixels.shape[-2:]
        rows, columns = torch.arange(height), torch.arange(width)
        if sizes is None:
            assert self.size is not None
            below, right = (rows >= self.size[0])[None], (columns >= self.size[1])[None]
        else:
            below, right = rows >= sizes[:, :1], columns >= sizes[:, 1:]
        return (below.unsqueeze(2) | right.unsqueeze(1)).expand(pixels.shape[0], -1, -1)

    def _names(self, given: dict[str, Tensor]) -> tuple[Tensor | ProjectedText, NameLimits]:
        if "text" not in given:
            text = ProjectedText(text=self.text, tokens=self.tokens, weights=(), precision=None)
            return text, NameLimits(presence=self.presence, queries=self.queries)
        shortlist: nn.Module | None = self.network.category_extraction.shortlist
        if isinstance(shortlist, RealNamesFirst):
            shortlist.real = given["presence"] <= 1
        return given["text"], NameLimits(presence=given["presence"], queries=self.queries)

    def _open(self, names: int) -> None:
        """Readies the network for rows of text that are no names."""
        config = self.network.config
        if config.categories.self_attention:
            what = "names that attend to each other (categories.self_attention) cannot be an input of an exported model"
            raise ModelError(what, where="--names", hint='fix them: --names "cat, dog"')
        self.register_buffer("queries", torch.full((names,), config.queries.number))
        extraction = self.network.category_extraction
        if extraction.shortlist is not None:
            extraction.shortlist = cast("Shortlist", RealNamesFirst(extraction.shortlist))


class RealNamesFirst(nn.Module):
    """A shortlist that takes rows that are no names last, so that names get what they would get without such rows."""

    def __init__(self, shortlist: Shortlist) -> None:
        super().__init__()
        self.shortlist, self.number = shortlist, shortlist.number
        self.real: Tensor | None = None

    def forward(self, memory: Memory, projected: Float[Tensor, "v d"], targets: Targets | None = None) -> Shortlisted:
        """As `Shortlist`."""
        del targets  # of training only
        assert self.real is not None
        logits = self.shortlist(memory, projected).logits.masked_fill(~self.real, -torch.inf)
        rows = logits.topk(min(self.number, logits.shape[1]), dim=1).indices
        return Shortlisted(logits, rows.sort(dim=1).values)


def interface_of(predictor: Predictor, pixels: str, names: int | None = None) -> Interface:
    """The inputs of a detector with these names, or with up to so many names as an input."""
    size = fixed_size(predictor.resize)
    shape = None if size is None else padded_shape(*size, predictor.multiple)
    width = int(predictor.text.shape[1])
    return Interface(pixels=pixels, multiple=predictor.multiple, shape=shape, names=names, text_width=width)


def fixed_size(resize: ResizeConfig) -> tuple[int, int] | None:
    """(height, width) in pixels to which all images are resized; None where it depends on the image."""
    return (resize.size, resize.size) if resize.mode == "stretch" else None


def example_inputs(interface: Interface, images: int = 2) -> tuple[Tensor, ...]:
    """Inputs of the kind that a graph takes, from a seed."""
    generator = torch.Generator().manual_seed(0)
    shape = interface.shape or (2 * interface.multiple, 3 * interface.multiple)
    pixels = torch.randint(0, 256, (images, 3, *shape), generator=generator, dtype=torch.uint8)
    given = [pixels if interface.pixels == "uint8" else pixels / 255]
    if interface.shape is None:
        given.append(torch.tensor([(shape[0] - 3 * n, shape[1] - 5 * n) for n in range(images)]))
    if interface.names is not None:
        text = torch.randn(max(1, interface.names // 2), interface.text_width, generator=generator)
        given += padded_names(nn.functional.normalize(text, dim=-1), [0.0] * len(text), interface.names)
    return tuple(given)


def padded_names(text: Float[Tensor, "v t"], least: Sequence[float], rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings and presence thresholds with rows that are no names after them."""
    empty = rows - len(text)
    presence = torch.tensor([*least, *[NO_NAME] * empty], dtype=torch.float32)
    return torch.cat([text, text.new_zeros(empty, text.shape[1])]), presence
