"""What another detector is to METR: how it is configured, which of its parameters is which of ours, what is derived."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Resampling
from torch import Tensor

from metr.conversion.activation_statistics import of_layer_head
from metr.conversion.classifier import Linear, layer_classifier
from metr.conversion.image_fits import ImageFits
from metr.conversion.table import Row, State
from metr.data.config import ResizeConfig
from metr.errors import ModelError
from metr.models.config import (
    BackboneConfig,
    DecoderConfig,
    DetectorConfig,
    EncoderConfig,
    QueryConfig,
    SimilarityConfig,
)
from metr.models.detector import Detector

FOLDED = "folded: similarity head and names"
"""How a classification head was made."""
FOLDED_PLACES = "folded: proposals' head and names"
"""How a head that scores places was made."""

Colours = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """What a target is to be built for.

    Attributes:
        config: The METR whose weights it gets.
        backbone: Their configuration of METR's backbone; `out_features` are the maps that METR's encoder reads.
        channels: Channels of those maps, finest first.
        strides: Pixels a cell of those maps.
        names: What it is to detect, in the order of its labels.
        fits: Whether METR's encoder and decoder are of the target's family; if not, they start afresh, and nothing has
            to agree with them.
    """

    config: DetectorConfig
    backbone: Any
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    names: tuple[str, ...]
    fits: bool

    @property
    def labels(self) -> dict[str, dict[Any, Any]]:
        """The names as transformers' configurations take them."""
        numbered = dict(enumerate(self.names))
        return {"id2label": numbered, "label2id": {name: number for number, name in numbered.items()}}


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    """One target's table, part by part; read in both directions.

    `copies` say where else the target keeps what is one module with METR (heads of every layer): they are written on
    the way out, and not read on the way in.
    """

    backbone: tuple[Row, ...] = ()
    encoder: tuple[Row, ...] = ()
    decoder: tuple[Row, ...] = ()
    heads: tuple[Row, ...] = ()
    copies: tuple[Row, ...] = ()

    def rows(self) -> tuple[Row, ...]:
        """The rows that hold in both directions."""
        return (*self.backbone, *self.encoder, *self.decoder, *self.heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What can be derived from.

    Attributes:
        network: METR's.
        text: The embedding of each name.
        tokens: Of each name, as its queries are compared with them.
        contents: Of each name, as its queries contain them.
        config: The target's.
        fits: What was fitted to images, if there were any.
    """

    network: Detector
    text: Float[Tensor, "v t"]
    tokens: Float[Tensor, "v d"]
    contents: Float[Tensor, "v d"]
    config: Any
    fits: ImageFits | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Derived:
    """A tensor of the receiver that is no copy: how it was made, in a few words, and from which keys of the giver."""

    tensor: Tensor
    how: str
    source: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What METR must be to take a target's weights.

    Attributes:
        config: METR's configuration.
        derived: Tensors that no row gives.
        class_heads: The prefixes of METR's class heads, each with that of the target's linear layer whose logits it is
            to give; none where they start afresh.
        first_label: Those of METR's class heads that are to give every name the logit of the target's first label.
        softmax: Those of METR's class heads whose names compete with all that the target's linear layer gives.
        differences: What METR computes otherwise in spite of these weights, in sentences.
    """

    config: DetectorConfig
    derived: Mapping[str, Derived] = field(default_factory=dict)
    class_heads: Mapping[str, str] = field(default_factory=dict)
    first_label: frozenset[str] = frozenset()
    softmax: frozenset[str] = frozenset()
    differences: tuple[str, ...] = ()


Derivation = Callable[[Context], Mapping[str, Derived]]


def nothing_derived(_: Context) -> Mapping[str, Derived]:
    """For a target of which all that moves is copied."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A detector of transformers that METR's weights move to, and (with `adopt`) come from.

    Attributes:
        name: What users write; transformers' `model_type`.
        title: What people call it.
        encoder: METR's encoder kind whose weights fit.
        other_encoders: Further encoder kinds of METR whose weights fit.
        decoder: METR's decoder kind whose weights fit.
        similar_decoders: METR's decoder kinds of which some weights fit.
        places: The kinds of METR's places of queries that it has a form for.
        learned_decoder: METR's decoder kind whose weights fit where places are learned; as elsewhere, if empty.
        backbone: The prefix of its backbone's keys.
        processor: Its image processor's class, without the suffix of a backend.
        configure: Its configuration.
        table: Its key table, for a configuration of its own and METR's.
        derive: The tensors that no row gives, by its keys; asked only where the families fit.
        differences: What it computes otherwise than such a METR in spite of equal weights, in sentences.
        told: The same of what these weights decide.
        in_training: What it does otherwise only while it is trained.
        adopt: The METR that its weights fit, from its configuration, METR's configuration of its backbone, and its
            weights; None where that direction is not offered.
        multiple: Its images' sides must be multiples of this.
        windowed: Its images' sides must also be multiples of what METR pads images to for the same backbone.
        single_map: It reads the backbone's last map only.
        square: Its images have one fixed size, as it looks at no padding mask.
        made_up_for: Those of `differences` that a fit to images makes up for; None where there is no such fit.
        adapted: It has METR's adapter where its backbone is a DINOv3.
    """

    name: str
    title: str
    encoder: str
    other_encoders: tuple[str, ...] = ()
    decoder: str = "deformable"
    similar_decoders: tuple[str, ...] = ()
    places: tuple[str, ...] = ("proposed",)
    learned_decoder: str = ""
    backbone: str = "model.backbone.model."
    processor: str
    configure: Callable[[BuildSpec], Any]
    table: Callable[[Any, DetectorConfig], KeyTable]
    derive: Derivation = nothing_derived
    differences: Callable[[DetectorConfig], tuple[str, ...]] = lambda _: ()
    told: Callable[[Context], tuple[str, ...]] = lambda _: ()
    in_training: tuple[str, ...] = ()
    adopt: Callable[[Any, BackboneConfig, State], Adopted] | None = None
    multiple: int = 1
    windowed: bool = False
    single_map: bool = False
    square: bool = False
    made_up_for: Callable[[DetectorConfig], tuple[str, ...]] | None = None
    adapted: bool = False

    def fits(self, config: DetectorConfig) -> bool:
        """Whether more than the backbone of such a METR has a place here."""
        encoders, decoders = (self.encoder, *self.other_encoders), (self.decoder, *self.similar_decoders)
        if self.learned_decoder and config.queries.places == "learned":
            decoders = (self.learned_decoder,)
        placed = config.queries.places in self.places
        return placed and config.encoder.kind in encoders and config.decoder.kind in decoders

    def resizes_otherwise(self, resize: ResizeConfig, pad_to: int = 1) -> tuple[str, ...]:
        """What its image processor does to an image's shape that METR does not, in sentences.

        Args:
            resize: METR's.
            pad_to: Pixels to multiples of which METR's backbone pads images.
        """
        multiple, size = self._multiple(pad_to), self._size(resize, pad_to)
        if resize.mode == "fit" and self.square:
            own = f"sides of {resize.size} to {resize.longest} (resize.mode: fit)"
            return (f"images are stretched to squares of {size} pixels; this METR's keep their aspect, with {own}",)
        if resize.mode == "stretch" and size != resize.size:
            return (f"images have {size} pixels, a multiple of {multiple}; this METR's have {resize.size}",)
        return ()

    def resizes(self, resize: ResizeConfig, pad_to: int = 1) -> ResizeConfig:
        """METR's equivalent of what its image processor does; arguments as for `resizes_otherwise`."""
        if resize.mode == "fit" and not self.square:
            return resize
        return ResizeConfig(mode="stretch", size=self._size(resize, pad_to), filter=resize.filter)

    def image_processor(self, resize: ResizeConfig, colours: Colours, pad_to: int = 1) -> Any:
        """Its image processor: METR's size and colours; `pad_to` as for `resizes_otherwise`."""
        import transformers

        own = self.resizes(resize, pad_to)
        shape = {"height": own.size, "width": own.size}
        if own.mode == "fit":
            shape = {"shortest_edge": own.size, "longest_edge": own.longest}
        mean, std = (list(map(float, colour)) for colour in colours)
        # without torchvision only this backend exists; what is saved names neither
        made: Any = getattr(transformers, f"{self.processor}Pil")
        filters = {} if resize.filter == "area" else {"resample": Resampling[resize.filter.upper()]}
        return made(size=shape, image_mean=mean, image_std=std, do_normalize=True, do_rescale=True, **filters)

    def _size(self, resize: ResizeConfig, pad_to: int) -> int:
        """METR's size, or the next larger one that it takes."""
        multiple = self._multiple(pad_to)
        return -(-resize.size // multiple) * multiple

    def _multiple(self, pad_to: int) -> int:
        return math.lcm(self.multiple, pad_to if self.windowed else 1)


def need_options(config: Any, wanted: Mapping[str, Any]) -> None:
    """Stops where METR has no counterpart of an option of theirs.

    Raises:
        ModelError: naming the option.
    """
    options = config.to_dict()
    for option, value in wanted.items():
        found = list(options[option]) if isinstance(options[option], tuple) else options[option]
        if found != value:
            what = f"METR needs {option} = {value!r}, found {found!r}"
            raise ModelError(what, where=config.model_type, hint=f"take one that was made with {option} = {value!r}")


def encoder_values(config: Any) -> dict[str, Any]:
    """What every configuration of theirs of several scales says of METR's encoder."""
    return {
        "layers": config.encoder_layers,
        "levels": config.num_feature_levels,
        "heads": config.encoder_attention_heads,
        "feed_forward": config.encoder_ffn_dim,
    }


def level_points(config: Any) -> list[int]:
    """How many points a head of their decoder samples on each level."""
    points = config.decoder_n_points
    return [points] * config.num_feature_levels if isinstance(points, int) else list(points)


def around(
    encoder: EncoderConfig,
    config: Any,
    backbone: BackboneConfig,
    decoder: Mapping[str, Any] | None = None,
    queries: Mapping[str, Any] | None = None,
    similarity: SimilarityConfig | None = None,
) -> DetectorConfig:
    """METR's configuration around an encoder.

    Args:
        encoder: METR's, of the target's family.
        config: The target's, which gives the sizes.
        backbone: METR's configuration of its backbone.
        decoder: What METR's decoder is besides, if not what it is by default.
        queries: The same of METR's queries.
        similarity: How METR compares with categories, if not as by default.
    """
    base, heads = DetectorConfig(), config.decoder_attention_heads
    categories = base.categories.model_copy(update={"heads": heads})
    places = (queries or {}).get("layout") == "places"
    number = config.num_queries if places else max(config.num_queries, categories.kept)
    sizes = {
        "layers": config.decoder_layers,
        "heads": heads,
        "points": max(level_points(config)),
        "feed_forward": config.decoder_ffn_dim,
    }
    learned = (queries or {}).get("places") == "learned"
    return DetectorConfig(
        width=config.d_model,
        backbone=backbone,
        denoising=base.denoising.model_copy(update={"number": 0}) if learned else base.denoising,
        encoder=encoder,
        decoder=DecoderConfig.model_validate(sizes | dict(decoder or {})),
        categories=categories,
        queries=QueryConfig(**{"number": number, **(queries or {})}),
        similarity=similarity or base.similarity,
    )


def box_heads(theirs: str, layers: int, ours: DetectorConfig) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows of the box heads of the decoder's layers, and of those that METR's one head is copied to.

    Args:
        theirs: What their keys begin with, before the layer's number.
        layers: How many layers the target's decoder has.
        ours: Says whether METR's layers have heads of their own.
    """
    if ours.decoder.predictors != "shared":
        own = (mlp(f"{theirs}.{layer}", f"decoder.box.{layer}.change", 3) for layer in range(layers))
        return joined(*own), ()
    heads = [mlp(f"{theirs}.{layer}", "decoder.box.change", 3) for layer in range(layers)]
    return heads[-1], joined(*heads[:-1])


ADOPTED_QUERIES = {"layout": "places", "content": "place_only", "attention": "image"}
"""Queries of a METR that looks where another detector looks: at its best places, whatever the category."""


def equal_presence(width: int) -> dict[str, Derived]:
    """Presence is the same for every name, as nobody has taught it yet."""
    key, how = "category_extraction.presence.feature.2", "nothing: presence was never taught"
    return {
        f"{key}.weight": Derived(tensor=torch.zeros(width, width), how=how),
        f"{key}.bias": Derived(tensor=torch.zeros(width), how=how),
    }


def layer_heads(context: Context, theirs: str) -> dict[str, Derived]:
    """The classification head of each of the decoder's layers, whose keys begin with `theirs` and its number."""
    fresh, how = dict[str, Derived](), FOLDED if context.fits is None else str(context.fits)
    for layer in range(context.config.decoder_layers):
        if context.fits is None:
            classes = layer_classifier(context.network, context.text, context.tokens, layer)
        else:
            classes = context.fits.heads[layer]
        fresh |= given_layer(f"{theirs}.{layer}", classes, how, of_layer_head(context.network, layer))
    return fresh


def given_layer(key: str, layer: Linear, how: str, source: tuple[str, ...]) -> dict[str, Derived]:
    """Weight and bias of a linear layer of theirs."""
    return {
        f"{key}.weight": Derived(tensor=layer.weight, how=how, source=source),
        f"{key}.bias": Derived(tensor=layer.bias, how=how, source=source),
    }


def linear(theirs: str, ours: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of modules with weight and bias: `names` maps their parts to ours."""
    return tuple(Row(f"{theirs}.{name}.{{p}}", f"{ours}.{own}.{{p}}") for name, own in names.items())


def attention(theirs: str, ours: str, out: str = "o_proj") -> tuple[Row, ...]:
    """Multi-head attention as transformers keeps it."""
    return linear(theirs, ours, {"q_proj": "query", "k_proj": "key", "v_proj": "value", out: "out"})


def deformable_attention(theirs: str, ours: str) -> tuple[Row, ...]:
    """Multi-scale deformable attention."""
    names = {"sampling_offsets": "offsets", "attention_weights": "weights"}
    return linear(theirs, ours, names | {"value_proj": "value", "output_proj": "out"})


def feed_forward(theirs: str, ours: str, first: str = "mlp.fc1", second: str = "mlp.fc2") -> tuple[Row, ...]:
    """A layer's last part: two linear layers and the norm after them."""
    return linear(theirs, ours, {first: "widen", second: "narrow", "final_layer_norm": "norm"})


def mlp(theirs: str, ours: str, layers: int) -> tuple[Row, ...]:
    """Linear layers with an activation between them, which METR counts too."""
    return tuple(Row(f"{theirs}.layers.{n}.{{p}}", f"{ours}.{2 * n}.{{p}}") for n in range(layers))


def joined(*parts: tuple[Row, ...]) -> tuple[Row, ...]:
    """One table of several."""
    return tuple(chain(*parts))
