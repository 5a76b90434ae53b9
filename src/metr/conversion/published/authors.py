"""The key table of the METR that its authors published (arXiv 2304.03580)."""

from metr.conversion.table import Row


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
