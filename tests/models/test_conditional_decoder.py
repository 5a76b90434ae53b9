"""The conditional decoder against transformers' DAB-DETR with the same weights, and what it looks at."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import DabDetrConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrDecoder, DabDetrMLP

from metr.layers.mlp import MLP
from metr.models.config import DecoderConfig
from metr.models.decoder import ConditionalDecoder, ConditionalDecoderLayer
from metr.models.encoders.pyramid import flatten, token_places
from metr.structures import Categories, Memory, Queries

WIDTH, HEADS, HIDDEN, LAYERS = 16, 4, 24, 3


def decoder_of(layers: int = LAYERS) -> ConditionalDecoder:
    config = DecoderConfig(kind="conditional", layers=layers, heads=HEADS, feed_forward=HIDDEN)
    decoder = ConditionalDecoder(WIDTH, config, 0.01, WIDTH)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def memory_of() -> Memory:
    """Two images, the second padded."""
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 44:], mask[1, :, 60:] = True, True
    return flatten([torch.randn(2, WIDTH, 4, 6)], mask)


def queries_of(number: int = 5, together: bool = True) -> tuple[Queries, Categories]:
    slot = torch.arange(number).expand(2, -1) % 2
    boxes = 0.1 + 0.5 * torch.rand(2, number, 4)
    queries = Queries(
        content=torch.randn(2, number, WIDTH, requires_grad=True),
        reference_boxes=boxes,
        slot=slot,
        group=torch.zeros_like(slot) if together else slot,
        valid=torch.ones_like(slot, dtype=torch.bool),
    )
    ids = torch.arange(2).expand(2, -1)
    categories = Categories(
        presence_logits=torch.zeros(1, 2, 2),
        text=torch.randn(2, WIDTH),
        tokens=torch.randn(2, 2, WIDTH),
        ids=ids,
        valid=torch.ones_like(ids, dtype=torch.bool),
    )
    return queries, categories


def load_mlp(ours: MLP, theirs: DabDetrMLP) -> None:
    for own, other in zip(list(ours)[::2], theirs.layers, strict=True):
        other.load_state_dict(own.state_dict())


def load_layer(ours: ConditionalDecoderLayer, theirs: nn.Module) -> None:
    among, cross = theirs.self_attn, theirs.cross_attn
    pairs = [
        (among.self_attn_query_content_proj, ours.among.query_content),
        (among.self_attn_query_pos_proj, ours.among.query_position),
        (among.self_attn_key_content_proj, ours.among.key_content),
        (among.self_attn_key_pos_proj, ours.among.key_position),
        (among.self_attn_value_proj, ours.among.value),
        (among.self_attn.output_proj, ours.among.out),
        (among.self_attn_layer_norm, ours.among_norm),
        (cross.cross_attn_query_content_proj, ours.cross.query_content),
        (cross.cross_attn_query_pos_sine_proj, ours.cross.query_place),
        (cross.cross_attn_key_content_proj, ours.cross.key_content),
        (cross.cross_attn_key_pos_proj, ours.cross.key_place),
        (cross.cross_attn_value_proj, ours.cross.value),
        (cross.cross_attn.output_proj, ours.cross.out),
        (cross.cross_attn_layer_norm, ours.cross_norm),
        (theirs.mlp.fc1, ours.feed_forward.widen),
        (theirs.mlp.fc2, ours.feed_forward.narrow),
        (theirs.mlp.final_layer_norm, ours.feed_forward.norm),
    ]
    if ours.cross.query_position is not None:
        pairs.append((cross.cross_attn_query_pos_proj, ours.cross.query_position))
    for target, source in pairs:
        target.load_state_dict(source.state_dict())


def dab_detr(ours: ConditionalDecoder) -> DabDetrDecoder:
    config = DabDetrConfig(
        hidden_size=WIDTH,
        decoder_layers=len(ours.layers),
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=HIDDEN,
        activation_function="relu",
        dropout=0.0,
    )
    theirs = DabDetrDecoder(config)
    theirs.bbox_embed = DabDetrMLP(WIDTH, WIDTH, 4, 3)
    load_mlp(ours.box.change, theirs.bbox_embed)
    load_mlp(ours.position, theirs.ref_point_head)
    load_mlp(ours.extent, theirs.ref_anchor_head)
    if ours.scale is not None:
        load_mlp(ours.scale, theirs.query_scale)
    theirs.layernorm.load_state_dict(ours.norm.state_dict())
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        load_layer(own, other)
    return theirs


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_equals_dab_detr(layers: int) -> None:
    """Boxes of every layer, and what reaches the content, with padding."""
    ours = decoder_of(layers)
    memory, (queries, categories) = memory_of(), queries_of()
    theirs = dab_detr(ours)
    answer = ours(queries, memory)
    asked = ours.ask(answer, categories.kept_tokens, queries.slot)
    expected = theirs(
        inputs_embeds=queries.content,
        encoder_hidden_states=memory.tokens,
        memory_key_padding_mask=~memory.padding_mask,
        object_queries=token_places(memory, WIDTH),
        query_position_embeddings=queries.reference_boxes.logit(),
    )
    start = expected.reference_points.detach().logit()  # theirs learn through it
    boxes = (theirs.bbox_embed(expected.intermediate_hidden_states) + start).sigmoid()
    torch.testing.assert_close(answer.boxes, boxes, atol=1e-5, rtol=1e-4)
    tokens = categories.tokens.gather(1, queries.slot.unsqueeze(-1).expand(-1, -1, WIDTH))
    logits = ours.similarity(expected.intermediate_hidden_states, tokens.expand(layers, -1, -1, -1))
    torch.testing.assert_close(asked, logits, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(boxes)
    found, wanted = (torch.autograd.grad(b, queries.content, direction)[0] for b in (answer.boxes, boxes))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_queries_attend_inside_their_group_only() -> None:
    decoder, memory = decoder_of(), memory_of()
    queries, _ = queries_of(number=6, together=False)
    plain = decoder(queries, memory)
    other = queries.content + torch.randn_like(queries.content) * (queries.group == 1).unsqueeze(-1)
    changed = decoder(replace(queries, content=other), memory)
    same = queries.group == 0
    torch.testing.assert_close(changed.features[:, same], plain.features[:, same])
    assert not torch.allclose(changed.features[:, ~same], plain.features[:, ~same], atol=1e-4)


@torch.no_grad()
def test_a_memory_of_several_levels_is_one_row_of_places() -> None:
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    levels = [torch.randn(1, WIDTH, 8, 12), torch.randn(1, WIDTH, 4, 6)]
    both = token_places(flatten(levels, mask), WIDTH)
    alone = [token_places(flatten([level], mask), WIDTH) for level in levels]
    torch.testing.assert_close(both, torch.cat(alone, dim=1))


def test_boxes_without_size_keep_everything_finite() -> None:
    decoder, memory = decoder_of(), memory_of()
    queries, categories = queries_of()
    boxes: Tensor = queries.reference_boxes.clone()
    boxes[..., 2:] = 0
    answer = decoder(replace(queries, reference_boxes=boxes), memory)
    logits = decoder.ask(answer, categories.kept_tokens, queries.slot)
    (answer.boxes.sum() + logits.sum()).backward()
    assert logits.isfinite().all()
    assert queries.content.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())
