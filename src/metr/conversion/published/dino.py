"""DINO as IDEA-Research published it, and the METR that its authors built on it: their files become METR's weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from metr.conversion.published import PickledCheckpoint
from metr.conversion.published.timm import numbered, resnet_options, resnet_rows
from metr.conversion.table import Row
from metr.conversion.targets.base import ADOPTED_QUERIES, Adopted, equal_presence
from metr.data.config import ResizeConfig
from metr.errors import ModelError
from metr.models.config import (
    BackboneConfig,
    CategoryConfig,
    DecoderConfig,
    DetectorConfig,
    EncoderConfig,
    QueryConfig,
    SimilarityConfig,
)


def _mlp(theirs: str, ours: str, layers: int) -> list[Row]:
    return [Row(f"{theirs}.{n}.{{p}}", f"{ours}.{2 * n}.{{p}}") for n in range(layers)]


def _attention(theirs: str, ours: str) -> list[Row]:
    stacked = tuple(f"{ours}.{name}.{{p}}" for name in ("query", "key", "value"))
    return [Row(f"{theirs}.in_proj_{{p}}", stacked), Row(f"{theirs}.out_proj.{{p}}", f"{ours}.out.{{p}}")]


def _deformable(theirs: str, ours: str) -> list[Row]:
    names = {
        "sampling_offsets": "offsets",
        "attention_weights": "weights",
        "value_proj": "value",
        "output_proj": "out",
    }
    return [Row(f"{theirs}.{name}.{{p}}", f"{ours}.{own}.{{p}}") for name, own in names.items()]


def _feed_forward(theirs: str, ours: str, norm: str) -> list[Row]:
    names = {"linear1": "widen", "linear2": "narrow", norm: "norm"}
    return [Row(f"{theirs}.{name}.{{p}}", f"{ours}.{own}.{{p}}") for name, own in names.items()]


_ENCODER = "transformer.encoder.layers.{i}"
_DECODER = "transformer.decoder.layers.{i}"
_EXTRACTION = "transformer.prompt_indicator"
_BLOCK = f"{_EXTRACTION}.prompt_blocks.{{i}}"

# Everything after the backbone. The authors store heads that are one module several times: the first copy is read.
AUTHORS: tuple[Row, ...] = (
    Row("input_proj.{i}.0.{p}", "encoder.projection.steps.{i}.0.{p}"),
    Row("input_proj.{i}.1.{p}", "encoder.projection.steps.{i}.1.{p}"),
    Row("transformer.level_embed", "encoder.level_embedding"),
    *_deformable(f"{_ENCODER}.self_attn", "encoder.layers.{i}.attention"),
    Row(f"{_ENCODER}.norm1.{{p}}", "encoder.layers.{i}.norm.{p}"),
    *_feed_forward(_ENCODER, "encoder.layers.{i}.feed_forward", "norm2"),
    Row(f"{_EXTRACTION}.convert_vector.{{p}}", "category_extraction.projection.{p}"),
    Row(f"{_EXTRACTION}.vector_ln.{{p}}", "category_extraction.norm.{p}"),
    *_attention(f"{_BLOCK}.cross_attn", "category_extraction.blocks.{i}.attention"),
    Row(f"{_BLOCK}.norm1.{{p}}", "category_extraction.blocks.{i}.norm.{p}"),
    *_feed_forward(f"{_BLOCK}.ffn", "category_extraction.blocks.{i}.feed_forward", "norm2"),
    *_mlp(f"{_EXTRACTION}.classifier_label.0.feature_linear", "category_extraction.presence.feature", 2),
    Row(f"{_EXTRACTION}.classifier_label.0.b", "category_extraction.presence.bias"),
    Row("transformer.enc_output.{p}", "proposals.feature.{p}"),
    Row("transformer.enc_output_norm.{p}", "proposals.norm.{p}"),
    Row("transformer.enc_out_class_embed.{p}", "proposals.category.{p}"),
    Row("num_classes_for_CEM_bais", "proposals.bias"),
    *_mlp("transformer.enc_out_bbox_embed.layers", "proposals.box.change", 3),
    Row("transformer.tgt_embed.weight", "class_queries.learned.weight"),
    *_attention(f"{_DECODER}.self_attn", "decoder.layers.{i}.among"),
    Row(f"{_DECODER}.norm2.{{p}}", "decoder.layers.{i}.among_norm.{p}"),
    *_deformable(f"{_DECODER}.cross_attn", "decoder.layers.{i}.cross"),
    Row(f"{_DECODER}.norm1.{{p}}", "decoder.layers.{i}.cross_norm.{p}"),
    *_feed_forward(_DECODER, "decoder.layers.{i}.feed_forward", "norm3"),
    Row("transformer.decoder.norm.{p}", "decoder.norm.{p}"),
    *_mlp("transformer.decoder.ref_point_head.layers", "decoder.position", 2),
    *_mlp("bbox_embed.0.layers", "decoder.box.change", 3),
    *_mlp("class_embed.0.feature_linear", "decoder.similarity.feature", 2),
    Row("class_embed.0.b", "decoder.similarity.bias"),
)

_NAMES = (
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,umbrella,N/A,N/A,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,N/A,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,"
    "tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
COCO: tuple[str, ...] = tuple(_NAMES.split(","))
"""COCO's categories by id, of which some are unused: the labels of a detector that has 91."""

_STRIDES = (4, 8, 16, 32)
_BODY = "backbone.0.body."
# queries of an image, and pixels of its shorter side, in what is published
_PUBLISHED_QUERIES, _SHORTEST = 900, 800
# attention heads of what is published
_HEADS = 8
# options that no tensor's shape tells, and what METR's equivalent has
_NEEDED: Mapping[str, Any] = {
    "dilation": False,
    "num_patterns": 0,
    "pe_temperatureH": 20,
    "pe_temperatureW": 20,
    "pre_norm": False,
    "transformer_activation": "relu",
    "two_stage_type": "standard",
}
_QUERIES = "transformer.tgt_embed.weight"
_BOX, _CLASS, _PLACES = "bbox_embed", "class_embed", "transformer.enc_out_class_embed"
# of what DINO and the authors call alike, what is not the same: heads for fixed classes
_OTHERWISE = (f"{_PLACES}.", f"{_CLASS}.")
# the keys of a decoder layer's heads, which files hold once more under the decoder
_LAYER_HEAD = re.compile(r"(?:transformer\.decoder\.)?((?:bbox|class)_embed)\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class DinoFile:
    """What a file of this family holds.

    Attributes:
        title: Who it is.
        rows: Its key table.
        state: Its weights. Tensors that are the same in several layers' heads are one.
        adopted: What METR must be, and what no row gives.
        names: What its labels are taken for, one a label; empty where nothing suggests names.
        resize: How its images are resized; None where that is left open.
        prompts: The text embeddings that METR's authors keep with their weights, if it is theirs.
        assumed: What it does not tell, and is taken for what is published.
    """

    title: str
    adopted: Adopted
    rows: tuple[Row, ...]
    state: Mapping[str, Tensor]
    names: tuple[str, ...]
    resize: ResizeConfig | None
    prompts: Tensor | None
    assumed: tuple[str, ...] = ()


def read_dino(checkpoint: PickledCheckpoint, where: object = None) -> DinoFile:
    """Recognises a checkpoint of DINO or of METR's authors, and says what METR it fits.

    Raises:
        ModelError: it is of neither, or carries a backbone other than a ResNet.
    """
    state = _joined(checkpoint.state)
    if "transformer.level_embed" not in state or "transformer.enc_output.weight" not in state:
        what = "expected the weights of DINO or of METR as their authors publish them, found other keys"
        raise ModelError(what, where=where, hint="for a detector of transformers name its folder, not a file in it")
    authors = any(key.startswith(f"{_EXTRACTION}.") for key in state)
    _check_options(checkpoint.options, state, where)
    try:
        config = _config(state, checkpoint.options, authors, where)
    except KeyError as error:
        what = f"the network is not whole: {error.args[0]} is missing"
        raise ModelError(what, where=where, hint="download or copy it again") from None
    except ValidationError as error:
        what = f"METR has no counterpart of this network: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        raise ModelError(what, where=where, hint="download or copy it again") from None
    told = "nheads" in checkpoint.options
    rows = (*(AUTHORS if authors else _dino_rows(config)), *resnet_rows(_BODY, "backbone.network."))
    return DinoFile(
        title="METR of its authors" if authors else "DINO",
        adopted=Adopted(config=config) if authors else _adopted(config),
        rows=rows,
        state=state,
        names=() if authors or len(state.get(f"{_CLASS}.0.bias", ())) != len(COCO) else COCO,
        resize=None if authors else ResizeConfig(mode="fit", size=_SHORTEST, filter="bilinear"),
        prompts=state.get(f"{_EXTRACTION}.class_prompts") if authors else None,
        assumed=() if told else (f"it does not tell how many attention heads it has: {_HEADS} are assumed",),
    )


def _check_options(options: Mapping[str, Any], state: Mapping[str, Tensor], where: object) -> None:
    """Checks what the file says of its training: a METR of other options would answer otherwise without a word.

    Raises:
        ModelError: METR has no counterpart of an option, or one cannot be right.
    """
    levels, width = state["transformer.level_embed"].shape
    for option, needed in {**_NEEDED, "num_feature_levels": levels}.items():
        if option in options and options[option] != needed:
            what = f"METR needs args.{option} = {needed!r}, found {options[option]!r}"
            raise ModelError(what, where=where, hint=f"take one that was trained with {option} = {needed!r}")
    for option, whole in (("nheads", width), ("num_queries", None)):
        value = options.get(option, 1)
        right = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not right or (whole is not None and whole % value):
            divides = "" if whole is None else f" that divides {whole}"
            what = f"args.{option}: expected a whole number above 0{divides}, found {value!r}"
            raise ModelError(what, where=where, hint="download or copy it again")


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with one tensor where the heads of several layers hold the same."""
    joined, kept = dict[str, Tensor](), dict[tuple[str, str], list[Tensor]]()
    for key, tensor in state.items():
        match = _LAYER_HEAD.fullmatch(key)
        known = kept.setdefault((match[1], match[3]), []) if match else []
        joined[key] = next((one for one in known if one is tensor or torch.equal(one, tensor)), tensor)
        known.append(tensor)
    return joined


def _dino_rows(config: DetectorConfig) -> tuple[Row, ...]:
    """The authors' table without heads for names; with a box head for each layer where METR's layers have their own."""
    rows = [row for row in AUTHORS if not row.theirs.startswith(_OTHERWISE)]
    if config.decoder.predictors == "shared":
        return tuple(rows)
    heads = [_mlp(f"{_BOX}.{n}.layers", f"decoder.box.{n}.change", 3) for n in range(config.decoder.layers)]
    return (*(row for row in rows if not row.theirs.startswith(f"{_BOX}.")), *chain(*heads))


def _adopted(config: DetectorConfig) -> Adopted:
    """What METR must be beside its configuration to find what DINO finds; a file without class heads gives none."""
    if config.similarity.form != "classifier":
        return Adopted(config=config)
    heads = {"proposals.classifier": _PLACES}
    if config.decoder.predictors == "shared":
        heads["decoder.similarity"] = f"{_CLASS}.0"
    else:
        heads |= {f"decoder.similarity.{n}": f"{_CLASS}.{n}" for n in range(config.decoder.layers)}
    return Adopted(config=config, derived=equal_presence(config.width), class_heads=heads)


def _config(state: Mapping[str, Tensor], options: Mapping[str, Any], authors: bool, where: object) -> DetectorConfig:
    """METR's configuration from the shapes of their weights, and from options where shapes do not tell."""
    levels, width = state["transformer.level_embed"].shape
    heads = int(options.get("nheads", _HEADS))
    points = state["transformer.encoder.layers.0.self_attn.attention_weights.bias"].shape[0] // (heads * levels)
    seen = state["transformer.decoder.layers.0.cross_attn.attention_weights.bias"].shape[0] // (heads * levels)
    encoder = EncoderConfig(
        layers=numbered(state, "transformer.encoder.layers"),
        levels=levels,
        heads=heads,
        points=points,
        feed_forward=state["transformer.encoder.layers.0.linear1.weight"].shape[0],
    )
    decoder = DecoderConfig(
        layers=numbered(state, "transformer.decoder.layers"),
        heads=heads,
        points=seen,
        feed_forward=state["transformer.decoder.layers.0.linear1.weight"].shape[0],
        padded_positions=True,
        predictors="shared" if authors else _predictors(state),
    )
    classified = not authors and all(f"{head}.bias" in state for head in (_PLACES, f"{_CLASS}.0"))
    return DetectorConfig(
        width=width,
        backbone=_resnet(state, where),
        encoder=encoder,
        categories=_categories(state, heads) if authors else CategoryConfig(heads=heads),
        queries=_shared(len(state[_QUERIES])) if authors else _places(state, options),
        similarity=SimilarityConfig(form="classifier" if classified else "product"),
        decoder=decoder,
    )


def _predictors(state: Mapping[str, Tensor]) -> Literal["shared", "normed_layer"]:
    """Whether the layers share their heads, as they do in what is published."""
    seen = dict[tuple[str, str], Tensor]()
    for key, tensor in state.items():
        match = _LAYER_HEAD.fullmatch(key)
        if match and seen.setdefault((match[1], match[3]), tensor) is not tensor:
            return "normed_layer"
    return "shared"


def _places(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> QueryConfig:
    """DINO's: the best places whatever the category, with learned contents, or in some files with their features."""
    learned = _QUERIES in state
    number = len(state[_QUERIES]) if learned else int(options.get("num_queries", _PUBLISHED_QUERIES))
    content = {"content": "learned_only"} if learned else {}
    return QueryConfig(**(ADOPTED_QUERIES | content | {"number": number}))


def _shared(learned: int) -> QueryConfig:
    """The authors': as many places, the same for each kept category, as there are learned queries."""
    return QueryConfig(layout="shared", number=CategoryConfig().kept * learned, ceiling=learned, floor=0)


def _categories(state: Mapping[str, Tensor], heads: int) -> CategoryConfig:
    block = f"{_EXTRACTION}.prompt_blocks"
    return CategoryConfig(
        blocks=numbered(state, block), heads=heads, feed_forward=state[f"{block}.0.ffn.linear1.weight"].shape[0]
    )


def _resnet(state: Mapping[str, Tensor], where: object) -> BackboneConfig:
    """The ResNet that the weights are of, by its blocks."""
    options = resnet_options(state, _BODY)
    if options is None:
        what = "carries a backbone other than a ResNet of torchvision"
        raise ModelError(what, where=where, hint="take a checkpoint with ResNet-50 or ResNet-101")
    maps = sum(
        tensor.shape[-1] == 1 for key, tensor in state.items() if re.fullmatch(r"input_proj\.\d+\.0\.weight", key)
    )
    return BackboneConfig(name="resnet", pretrained=False, strides=_STRIDES[-maps:], options=options)
