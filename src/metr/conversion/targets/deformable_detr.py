"""Deformable DETR (Zhu et al., 2021): of two stages, or of one stage with or without refinement of boxes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.conversion.activation_statistics import (
    box_position,
    four_encodings,
    inside,
    mean_feature,
    of_contents,
    of_places,
)
from metr.conversion.classifier import Linear, fit_stacked_norm, place_classifier
from metr.conversion.table import Row, State, backbone_rows
from metr.conversion.targets.base import (
    ADOPTED_QUERIES,
    FOLDED_PLACES,
    Adopted,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
    around,
    attention,
    box_heads,
    deformable_attention,
    encoder_values,
    equal_presence,
    feed_forward,
    given_layer,
    joined,
    layer_heads,
    linear,
    mlp,
    need_options,
)
from metr.errors import ModelError
from metr.models.config import BackboneConfig, DetectorConfig, EncoderConfig, SimilarityConfig
from metr.models.learned_places import LearnedPlaces

_PLACES, _SWAPPED = "proposals.classifier", "x before y"
_SAME_ROW = 1e-4
_QUERIES, _HALVES = "model.query_position_embeddings.weight", ("position", "content")
# the least distance from 0 and 1 of a box's numbers that it refines
_MARGIN = 1e-5
# the channels of each of its group norms must be a whole number
_GROUPS = 32


def configure(spec: BuildSpec) -> Any:
    """A DeformableDetrConfig of two stages, or of one stage where METR's places are learned.

    Raises:
        ModelError: the width does not divide into its groups.
    """
    from transformers import DeformableDetrConfig

    config, ours = spec.config, spec.config.encoder if spec.fits else EncoderConfig()
    if config.width % _GROUPS:
        what = f"needs a width that {_GROUPS} divides, found {config.width}"
        raise ModelError(what, where="model.width", hint="transfer from a METR of another width")
    labels: dict[str, Any] = spec.labels
    two_stages = config.queries.places == "proposed" or not spec.fits
    return DeformableDetrConfig(
        backbone_config=spec.backbone,
        d_model=config.width,
        num_feature_levels=ours.levels if spec.fits else max(len(spec.channels), config.encoder.levels),
        encoder_layers=ours.layers,
        encoder_ffn_dim=ours.feed_forward,
        encoder_attention_heads=ours.heads,
        encoder_n_points=ours.points,
        decoder_layers=config.decoder.layers,
        decoder_ffn_dim=config.decoder.feed_forward,
        decoder_attention_heads=config.decoder.heads,
        decoder_n_points=config.decoder.points,
        two_stage=two_stages,
        with_box_refine=two_stages or config.decoder.refine == "each",
        num_queries=config.queries.number,
        two_stage_num_proposals=config.queries.number,
        auxiliary_loss=True,
        dropout=0.0,
        class_cost=2,
        **labels,
    )


def table(config: Any, metr: DetectorConfig) -> KeyTable:
    """Deformable DETR's; a box head that every layer has for itself is METR's one."""
    encoder, decoder = "model.encoder.layers.{i}", "model.decoder.layers.{i}"
    ours, last = "decoder.layers.{i}", config.decoder_layers - 1
    heads, copies = box_heads("bbox_embed", config.decoder_layers, metr)
    proposals = linear("model", "learned_places", {"reference_points": "point.0"})
    if config.two_stage:
        proposals = joined(
            linear("model", "proposals", {"enc_output": "feature", "enc_output_norm": "norm"}),
            mlp(f"bbox_embed.{last + 1}", "proposals.box.change", 3),
        )
    return KeyTable(
        backbone=backbone_rows(config.backbone_config, TARGET.backbone),
        encoder=joined(
            (
                Row("model.input_proj.{i}.0.{p}", "encoder.projection.steps.{i}.0.{p}"),
                Row("model.input_proj.{i}.1.{p}", "encoder.projection.steps.{i}.1.{p}"),
                Row("model.level_embed", "encoder.level_embedding"),
            ),
            deformable_attention(f"{encoder}.self_attn", "encoder.layers.{i}.attention"),
            linear(encoder, "encoder.layers.{i}", {"self_attn_layer_norm": "norm"}),
            feed_forward(encoder, "encoder.layers.{i}.feed_forward"),
        ),
        decoder=joined(
            attention(f"{decoder}.self_attn", f"{ours}.among"),
            linear(decoder, ours, {"self_attn_layer_norm": "among_norm", "encoder_attn_layer_norm": "cross_norm"}),
            deformable_attention(f"{decoder}.encoder_attn", f"{ours}.cross"),
            feed_forward(decoder, f"{ours}.feed_forward"),
        ),
        heads=joined(proposals, heads),
        copies=copies,
    )


def derive(context: Context) -> Mapping[str, Derived]:
    """The classification heads, and what queries start from.

    Places are chosen by the first label's score, whatever the label, and transformers never trains that score: it
    becomes the mean of all names'. With one stage there are none, and queries are METR's.
    """
    learned = context.network.learned_places
    if isinstance(learned, LearnedPlaces) and learned.content is not None:
        halves = [learned.position.weight.detach(), learned.content.weight.detach()]
        source = tuple(f"learned_places.{half}.weight" for half in _HALVES)
        queries = {_QUERIES: Derived(tensor=torch.cat(halves, dim=1), how="side by side", source=source)}
        return layer_heads(context, "class_embed") | queries
    places = place_classifier(context.network, context.text, context.tokens)
    places.weight[0], places.bias[0] = places.weight.mean(0), places.bias.mean(0)
    key = f"class_embed.{context.config.decoder_layers}"
    head = given_layer(key, places, FOLDED_PLACES, of_places(context.network))
    return layer_heads(context, "class_embed") | head | _queries(context)


@torch.no_grad()
def _queries(context: Context) -> dict[str, Derived]:
    """Position and content of a query from its box: METR's position, and the mean of what its queries contain."""
    network, width = context.network, context.network.config.width
    if network.config.decoder.positions == "first":
        return _kept_queries(context)
    position = box_position(network) or network.decoder.position
    content = context.contents.mean(0)
    if network.class_queries.learned is not None:
        content = content + network.class_queries.learned.weight.mean(0)
    feature, of_feature = mean_feature(network)
    content = content + feature
    fit = fit_stacked_norm(position, content, partial(four_encodings, width=width))
    stacked, norm = fit.layers
    source = (*inside(network, "decoder.position", "class_queries"), *of_contents(network), *of_feature)
    scale = {"weight": norm.weight.diagonal().clone(), "bias": norm.bias}
    return given_layer("model.pos_trans", stacked, str(fit), source) | {
        f"model.pos_trans_norm.{name}": Derived(tensor=value, how=str(fit), source=source)
        for name, value in scale.items()
    }


def _kept_queries(context: Context) -> dict[str, Derived]:
    """The same of a METR whose queries keep their position: copied, and what else its queries contain in the mean."""
    network, queries = context.network, context.network.class_queries
    made = network.decoder.position
    assert isinstance(made, nn.Sequential)
    weight, scale, shift = (made.get_parameter(key) for key in ("0.weight", "1.weight", "1.bias"))
    content, source = torch.zeros(network.config.width), inside(network, "decoder.position.1", "class_queries")
    if network.config.queries.content in ("learned", "place"):
        content, source = content + context.contents.mean(0), source + of_contents(network)
    if queries.learned is not None:
        content = content + queries.learned.weight.mean(0)
    feature, of_feature = mean_feature(network)
    content, source = content + feature, (*source, *of_feature)
    how = "" if network.config.queries.content == "box_only" else "shifted by contents"
    norms = {"weight": scale, "bias": shift + torch.cat([torch.zeros_like(content), content])}
    exact = Linear(weight=_x_before_y(weight), bias=made.get_parameter("0.bias"))
    return given_layer("model.pos_trans", exact, _SWAPPED, inside(network, "decoder.position.0")) | {
        f"model.pos_trans_norm.{name}": Derived(tensor=tensor.clone(), how=how, source=source)
        for name, tensor in norms.items()
    }


def _x_before_y(weight: Float[Tensor, "o c"]) -> Float[Tensor, "o c"]:
    """A linear layer of an encoded box whose x and y change places: METR encodes y first."""
    y, x, w, h = weight.chunk(4, dim=1)
    return torch.cat([x, y, w, h], dim=1)


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What Deformable DETR computes otherwise."""
    said = []
    if config.queries.places == "learned" and config.decoder.first_samples != "cells":
        said.append("the first layer samples by cells around points; this METR's by sides of boxes")
    if config.decoder.positions not in ("first", "learned"):
        said.append("a query keeps the position of its first box; METR's follows the box from layer to layer")
    if config.encoder.positions != "centred":
        said.append(f"the encoder's positions are those of cells' centres; this METR's are {config.encoder.positions}")
    if _has_fewer_groups(config.width):
        said.append(f"group norms have {_GROUPS} groups; this METR's have fewer")
    return tuple(said)


@torch.no_grad()
def told(context: Context) -> tuple[str, ...]:
    """Whether its first label's score, which chooses the places, is that of METR's best name."""
    if context.network.learned_places is not None:
        return ()
    places = place_classifier(context.network, context.text, context.tokens)
    rows = torch.cat([places.weight, places.bias.unsqueeze(1)], dim=1)
    if bool((rows - rows[0]).abs().max() < _SAME_ROW):
        return ()
    return ("places are chosen by one score, the mean of the labels'; METR's by that of the best name",)


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR that computes all that it does: with proposals for two stages, with learned places for one.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    need_options(config, {"position_embedding_type": "sine", "activation_function": "relu"})
    encoder = EncoderConfig(
        kind="deformable", positions="centred", points=config.encoder_n_points, **encoder_values(config)
    )
    layers = {f"decoder.similarity.{n}": f"class_embed.{n}" for n in range(config.decoder_layers)}
    fewer = (f"its group norms have {_GROUPS} groups, METR's have fewer at a width of {config.d_model}",)
    differences = fewer if _has_fewer_groups(config.d_model) else ()
    decoder = {"predictors": "layer", "box_margin": _MARGIN}
    if not config.two_stage:
        refine = "each" if config.with_box_refine else "none"
        decoder |= {"positions": "learned", "first_samples": "cells", "refine": refine}
        queries = ADOPTED_QUERIES | {"content": "learned_only", "places": "learned"}
        return Adopted(
            config=around(encoder, config, backbone, decoder, queries, SimilarityConfig(form="classifier")),
            derived=_learned(state) | equal_presence(config.d_model),
            class_heads=layers,
            differences=differences,
        )
    decoder |= {"positions": "first"}
    queries = ADOPTED_QUERIES | {"content": "box_only", "number": config.two_stage_num_proposals}
    return Adopted(
        config=around(encoder, config, backbone, decoder, queries, SimilarityConfig(form="classifier")),
        derived=_positions(state) | equal_presence(config.d_model),
        class_heads={_PLACES: f"class_embed.{config.decoder_layers}"} | layers,
        # places are chosen by the first label's score, whatever the label
        first_label=frozenset({_PLACES}),
        differences=differences,
    )


def _has_fewer_groups(width: int) -> bool:
    """Whether METR's group norms have fewer groups than Deformable DETR's."""
    return width % (4 * _GROUPS) != 0


def _learned(state: State) -> dict[str, Derived]:
    """Positions and contents of the queries of one stage, which stand side by side."""
    parts = zip(_HALVES, state[_QUERIES].chunk(2, dim=1), strict=True)
    return {
        f"learned_places.{half}.weight": Derived(tensor=part.contiguous(), how="unstacked", source=(_QUERIES,))
        for half, part in parts
    }


def _positions(state: State) -> dict[str, Derived]:
    """What makes position and content of a query from its first box."""
    key, norm = "model.pos_trans", "model.pos_trans_norm"
    swapped = _x_before_y(state[f"{key}.weight"])
    moved = {"0.weight": Derived(tensor=swapped, how=_SWAPPED, source=(f"{key}.weight",))}
    copied = {"0.bias": f"{key}.bias", "1.weight": f"{norm}.weight", "1.bias": f"{norm}.bias"}
    moved |= {part: Derived(tensor=state[source], how="", source=(source,)) for part, source in copied.items()}
    return {f"decoder.position.{part}": one for part, one in moved.items()}


TARGET = Target(
    name="deformable_detr",
    title="Deformable DETR",
    encoder="deformable",
    places=("proposed", "learned"),
    processor="DeformableDetrImageProcessor",
    configure=configure,
    table=table,
    derive=derive,
    differences=differences,
    told=told,
    adopt=adopt,
)
