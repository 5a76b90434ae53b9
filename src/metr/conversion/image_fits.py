"""Fits for images: how another detector's queries start, and its class heads, so that it finds what a METR finds.

A METR whose queries are asked by name has no exact counterpart: queries of RT-DETR and its successors contain the
feature of their place and nothing else, and answer for all names. What METR does on some images, without their labels,
tells the linear layers that come nearest.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.conversion.classifier import Linear, least_squares, name_tokens
from metr.models.category_selection import select_categories
from metr.models.config import DetectorConfig
from metr.models.detector import Detector, most_queries
from metr.structures import Memory, NameLimits

# what a query counts for that is sure of nothing, beside its largest probability
_LEAST_WEIGHT = 0.02
# singular values below this fraction of the largest are of directions that a norm takes out
_NEGLIGIBLE = 1e-9

Images = Iterable[tuple[Float[Tensor, "b 3 h w"], Bool[Tensor, "b h w"]]]
"""Batches of images and their padding masks, as the network takes them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What queries of METR were on some images.

    Attributes:
        features: Of their places.
        contents: What they started with.
        layers: What each decoder layer made of them, before its norm.
        logits: Of every name, as METR's head after each layer answers for such a query.
        weights: How much each query counts: that which may be an object counts most.
    """

    features: Float[Tensor, "n d"]
    contents: Float[Tensor, "n d"]
    layers: tuple[Float[Tensor, "n d"], ...]
    logits: tuple[Float[Tensor, "n v"], ...]
    weights: Float[Tensor, "n"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFits:
    """What METR does on some images, in linear layers.

    Attributes:
        features: A sample of the features of queries' places.
        content: From a place's feature to what a query contains.
        heads: From what each decoder layer gives to the logits of all names.
        images: How many images these were fitted on.
    """

    features: Float[Tensor, "n d"]
    content: Linear
    heads: tuple[Linear, ...]
    images: int

    def __str__(self) -> str:
        """A short description."""
        return f"fitted to {self.images} images"


def can_fit(config: DetectorConfig) -> bool:
    """Whether such a METR's queries start otherwise than from the features of their places alone."""
    queries = config.queries
    return queries.places == "proposed" and queries.layout != "places" and queries.content != "place_only"


@torch.no_grad()
def fit_to_images(
    network: Detector, text: Float[Tensor, "v t"], images: Callable[[], Images], limits: NameLimits | None = None
) -> ImageFits:
    """Fits on images, which are read twice.

    The heads are fitted to queries that start as the fit says and all attend to each other, as they will.

    Args:
        network: METR's, for which `can_fit` holds.
        text: The names' embeddings.
        images: Gives the batches, anew at each call. Labels are not needed.
        limits: Of the names, as in detection.
    """
    watched = _Watch(network=network, text=text, limits=limits)
    first, number = watched.over(images(), None)
    content = least_squares(first.features, first.contents, first.weights)
    second, _ = watched.over(images(), content)
    heads = [least_squares(*each, second.weights) for each in zip(second.layers, second.logits, strict=True)]
    return ImageFits(features=first.features, content=content, heads=tuple(heads), images=number)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watch:
    """A network that is watched while it looks for names."""

    network: Detector
    text: Float[Tensor, "v t"]
    limits: NameLimits | None

    def over(self, batches: Images, content: Linear | None) -> tuple[Seen, int]:
        """What its queries are, and how many images there were; `content` replaces what they start with."""
        found, number = list[Seen](), 0
        for images, mask in batches:
            found.append(self._queries(self.network.encode(images, mask), content))
            number += len(images)
        return _together(found), number

    def _queries(self, memory: Memory, content: Linear | None) -> Seen:
        network = self.network
        categories = network.category_extraction(memory, self.text)
        categories = select_categories(categories, network.config, limits=self.limits)
        proposals, features = network.proposals(memory, categories, most_queries(categories, self.limits))
        queries, valid = network.class_queries(proposals, features, categories), proposals.valid
        if content is not None:
            group = torch.zeros_like(queries.group).masked_fill(~valid, -1)
            start = Linear(weight=content.weight.to(features), bias=content.bias.to(features))
            queries = replace(queries, content=start(features), group=group)
        with _outputs(network.decoder.layers) as outputs:
            decoded = network.decoder(queries, memory)
        images, number = valid.shape
        tokens = self._tokens().expand(images, -1, -1)
        # what the shape of a box's distribution adds is not the class heads' to say
        pairs, _ = network.decoder.ask_everywhere(replace(decoded, quality=None), tokens)
        logits = rearrange(pairs, "r b (v q) -> r b q v", q=number)
        rows = tuple(layer[valid].cpu() for layer in logits)
        return Seen(
            features=features[valid].cpu(),
            contents=queries.content[valid].cpu(),
            layers=tuple(output[valid].cpu() for output in outputs),
            logits=rows,
            weights=rows[-1].sigmoid().amax(1) + _LEAST_WEIGHT,
        )

    def _tokens(self) -> Float[Tensor, "v c"]:
        """Of the names, as queries are compared with them."""
        if self.network.config.similarity.form == "classifier":
            return self.text
        return name_tokens(self.network, self.text)


def _together(found: Sequence[Seen]) -> Seen:
    def joined(parts: Iterator[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    layers = range(len(found[0].layers))
    return Seen(
        features=joined(one.features for one in found),
        contents=joined(one.contents for one in found),
        layers=tuple(joined(one.layers[layer] for one in found) for layer in layers),
        logits=tuple(joined(one.logits[layer] for one in found) for layer in layers),
        weights=joined(one.weights for one in found),
    )


@contextmanager
def _outputs(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What each layer gives while the context lasts."""
    given = list[Tensor]()
    hooks = [layer.register_forward_hook(lambda _, __, output: given.append(output)) for layer in layers]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, kw_only=True, eq=False)
class NormedStart:
    """A linear layer and the affine part of a layer norm from memory to what queries contain.

    `scale` and `shift` are the norm's. `back` gives METR's feature of a place, nearly, from what the norm gives.
    """

    layer: Linear
    scale: Float[Tensor, "d"]
    shift: Float[Tensor, "d"]
    back: Linear


@torch.no_grad()
def normed_start(network: Detector, fits: ImageFits) -> NormedStart:
    """What queries contain as a layer norm of a linear layer of the memory, as RT-DETR makes it.

    METR's feature is such a norm too. Any linear map of it can be pulled in front of the norm, which then divides by
    another deviation: about the same for all places, so that contents keep their direction and nearly their length.
    """
    own = network.proposals
    scale, shift = own.norm.weight.detach(), own.norm.bias.detach()
    wide = fits.content.weight * scale  # from the normalised feature
    sizes = wide.norm(dim=1).clamp(min=1e-6)
    turned = wide / sizes.unsqueeze(1)
    turned = turned - turned.mean(0)  # as the norm will
    normalised = (fits.features - shift) / scale
    spread = (normalised @ turned.T).std(1, unbiased=False).mean()
    width = len(scale)
    centred = turned @ (torch.eye(width) - 1 / width)
    constant = fits.content(shift)
    # the norm's output knows nothing along one direction, and neither does METR's
    rows = torch.cat([turned * sizes.unsqueeze(1), torch.ones(1, width)]).double()
    inverse = torch.linalg.pinv(rows, rtol=_NEGLIGIBLE)[:, :width].to(scale)
    back = scale.unsqueeze(1) * inverse
    return NormedStart(
        layer=Linear(weight=centred, bias=torch.zeros(width)).after(Linear.of(own.feature)),
        scale=sizes * spread,
        shift=constant,
        back=Linear(weight=back, bias=shift - back @ constant),
    )
