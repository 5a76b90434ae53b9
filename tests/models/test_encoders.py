"""Encoders against transformers' DETR, Deformable DETR and RT-DETR with the same weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm
from transformers import DeformableDetrConfig, DetrConfig, RTDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoder
from transformers.models.detr.modeling_detr import DetrEncoder, DetrSinePositionEmbedding
from transformers.models.rt_detr.modeling_rt_detr import RTDetrConvNormLayer, RTDetrCSPRepLayer, RTDetrHybridEncoder

from metr.layers.position_encoding import grid_encoding
from metr.models.config import EncoderConfig
from metr.models.encoders import build_encoder
from metr.models.encoders.deformable import DeformableEncoder, reference_points
from metr.models.encoders.hybrid import ConvNorm, Fusion, HybridEncoder, LiteEncoder
from metr.models.encoders.pyramid import PlainEncoder, Projection, flatten, level_mask, valid_ratio

WIDTH, HEADS, HIDDEN = 16, 4, 24
CHANNELS = (6, 8, 10)
SHAPES = ((8, 12), (4, 6), (2, 3))
# parts of a layer of theirs, and ours
ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
DEFORMABLE_ATTENTION = {
    "sampling_offsets": "offsets",
    "attention_weights": "weights",
    "value_proj": "value",
    "output_proj": "out",
}
AROUND_ATTENTION = {
    "self_attn_layer_norm": "norm",
    "mlp.fc1": "feed_forward.widen",
    "mlp.fc2": "feed_forward.narrow",
    "final_layer_norm": "feed_forward.norm",
}


def encoder_config(kind: str, **values: Any) -> EncoderConfig:
    common = {"kind": kind, "layers": 2, "levels": 3, "heads": HEADS, "feed_forward": HIDDEN, "fusion_blocks": 3}
    return EncoderConfig(**common | values)


def padding(whole: bool = False) -> Tensor:
    """Masks of two images of 64 x 96 pixels: one whole, one of 44 x 60."""
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    if not whole:
        mask[1, 44:], mask[1, :, 60:] = True, True
    return mask


def maps_of(channels: Sequence[int], shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Tensor]:
    return [torch.randn(2, c, *shape, requires_grad=True) for c, shape in zip(channels, shapes, strict=True)]


def stir(module: nn.Module) -> None:
    """Random weights, and statistics off 0 and 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)


def load_layers(ours: nn.ModuleList, theirs: nn.ModuleList, attention: Mapping[str, str]) -> None:
    """Gives their layers the weights of ours."""
    parts = {f"self_attn.{name}": f"attention.{own}" for name, own in attention.items()} | AROUND_ATTENTION
    for layer, other in zip(ours, theirs, strict=True):
        for name, own in parts.items():
            other.get_submodule(name).load_state_dict(layer.get_submodule(own).state_dict())


def same_gradients(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> None:
    direction = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(out, inputs, direction) for out in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# What both encoders share


def test_a_cell_is_padding_where_its_first_pixel_is() -> None:
    mask = level_mask(padding(), (8, 12))
    assert not mask[0].any()
    assert torch.equal(mask[1], padding()[1, ::8, ::8])
    # an image that ends inside a cell has that cell; the smallest image has the first one
    tiny = torch.ones(1, 64, 96, dtype=torch.bool)
    tiny[:, :1, :1] = False
    assert (~level_mask(tiny, (2, 3))).sum() == 1
    torch.testing.assert_close(valid_ratio(mask), torch.tensor([[1.0, 1.0], [8 / 12, 6 / 8]]))


def test_flattening_goes_level_by_level_and_row_by_row() -> None:
    maps = maps_of((WIDTH,) * 3)
    memory = flatten(maps, padding())
    assert memory.level_shapes == SHAPES
    start = 0
    for level, ((height, width), cells) in enumerate(zip(SHAPES, maps, strict=True)):
        row, column = height - 2, width - 1
        assert torch.equal(memory.tokens[1, start + row * width + column], cells[1, :, row, column])
        mask = memory.padding_mask[1, start : start + height * width].view(height, width)
        assert torch.equal(mask, level_mask(padding(), (height, width))[1])
        torch.testing.assert_close(memory.valid_ratios[1, level], valid_ratio(mask.unsqueeze(0))[0])
        start += height * width
    assert memory.tokens.shape[1] == start


def test_further_levels_are_made_from_the_backbones_last_map() -> None:
    projection = Projection(CHANNELS, WIDTH, 5)
    stir(projection)
    features = maps_of(CHANNELS)
    levels = projection(features)
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]

    def step(index: int, source: Tensor, **options: int) -> Tensor:
        convolution, norm = projection.steps[index]
        maps = conv2d(source, convolution.weight, convolution.bias, **options)
        return group_norm(maps, norm.num_groups, norm.weight, norm.bias)

    for index in range(3):
        torch.testing.assert_close(levels[index], step(index, features[index]))
    torch.testing.assert_close(levels[3], step(3, features[2], stride=2, padding=1))
    torch.testing.assert_close(levels[4], step(4, levels[3], stride=2, padding=1))


@pytest.mark.parametrize(("width", "groups"), [(256, 32), (128, 32), (192, 16), (32, 8), (8, 2)])
def test_norms_have_groups_of_four_or_more(width: int, groups: int) -> None:
    """32 groups at the usual widths, as Deformable DETR."""
    assert Projection((4,), width, 1).steps[0][1].num_groups == groups


@pytest.mark.parametrize("kind", ["deformable", "hybrid"])
def test_fewer_levels_than_maps_keep_the_coarsest(kind: str) -> None:
    encoder = build_encoder(CHANNELS, WIDTH, encoder_config(kind, levels=2)).eval()
    assert encoder(maps_of(CHANNELS), padding()).level_shapes == SHAPES[1:]


# Deformable


def deformable_pair(levels: int) -> tuple[DeformableEncoder, DeformableDetrEncoder]:
    """Our encoder, and transformers' with the weights of our layers."""
    ours = DeformableEncoder(CHANNELS, WIDTH, encoder_config("deformable", levels=levels))
    stir(ours)
    config = DeformableDetrConfig(
        d_model=WIDTH,
        num_feature_levels=levels,
        encoder_layers=2,
        encoder_attention_heads=HEADS,
        encoder_n_points=4,
        encoder_ffn_dim=HIDDEN,
        dropout=0.0,
        activation_dropout=0.0,
    )
    theirs = DeformableDetrEncoder(config)
    load_layers(ours.layers, theirs.layers, DEFORMABLE_ATTENTION)
    return ours, theirs


@pytest.mark.parametrize("levels", [3, 4])
def test_deformable_equals_transformers(levels: int) -> None:
    ours, theirs = deformable_pair(levels)
    features = maps_of(CHANNELS)
    start = flatten(ours.projection(features), padding())
    # theirs counts places from half a cell: it is given ours, level embeddings included
    positions = [
        rearrange(grid_encoding(level_mask(padding(), shape), WIDTH), "b h w d -> b (h w) d") + ours.level_embedding[i]
        for i, shape in enumerate(start.level_shapes)
    ]
    expected = theirs(
        inputs_embeds=start.tokens,
        attention_mask=~start.padding_mask,
        spatial_position_embeddings=torch.cat(positions, dim=1),
        spatial_shapes=torch.tensor(start.level_shapes),
        spatial_shapes_list=list(start.level_shapes),
        valid_ratios=start.valid_ratios,
    ).last_hidden_state
    answer = ours(features, padding()).tokens
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
    same_gradients(answer, expected, features)


def test_reference_points_equal_transformers() -> None:
    memory = flatten(maps_of((WIDTH,) * 3), padding())
    expected = DeformableDetrEncoder.get_reference_points(SHAPES, memory.valid_ratios, torch.device("cpu"))
    torch.testing.assert_close(reference_points(memory), expected)


# Plain


def plain_pair() -> tuple[PlainEncoder, DetrEncoder]:
    """Our encoder, and transformers' with the weights of our layers."""
    ours = PlainEncoder(CHANNELS, WIDTH, encoder_config("plain"))
    stir(ours)
    config = DetrConfig(
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        dropout=0.0,
        activation_dropout=0.0,
    )
    theirs = DetrEncoder(config)
    load_layers(ours.layers, theirs.layers, ATTENTION)
    return ours, theirs


def test_plain_equals_detr() -> None:
    ours, theirs = plain_pair()
    features = maps_of(CHANNELS)
    mask = level_mask(padding(), SHAPES[-1])
    positions = DetrSinePositionEmbedding(WIDTH // 2, normalize=True)(
        features[-1].shape, torch.device("cpu"), torch.float32, mask=~mask
    )
    expected = theirs(
        inputs_embeds=rearrange(ours.projection(features[-1]), "b d h w -> b (h w) d"),
        attention_mask=rearrange(~mask, "b h w -> b (h w)"),
        spatial_position_embeddings=rearrange(positions, "b d h w -> b (h w) d"),
    ).last_hidden_state
    memory = ours(features, padding())
    assert memory.level_shapes == SHAPES[-1:]
    torch.testing.assert_close(memory.tokens, expected, atol=1e-5, rtol=1e-5)
    same_gradients(memory.tokens, expected, features[-1:])


# Hybrid


def load_convolution(ours: ConvNorm, theirs: RTDetrConvNormLayer) -> None:
    theirs.conv.load_state_dict(ours[0].state_dict())
    theirs.norm.load_state_dict(ours[1].state_dict())


def load_fusion(ours: Fusion, theirs: RTDetrCSPRepLayer) -> None:
    load_convolution(ours.main, theirs.conv1)
    load_convolution(ours.side, theirs.conv2)
    for own, other in zip(ours.blocks, theirs.bottlenecks, strict=True):
        load_convolution(own.wide, other.conv1)
        load_convolution(own.narrow, other.conv2)
    if isinstance(ours.out, ConvNorm):
        load_convolution(ours.out, theirs.conv3)


class OurPositions(nn.Module):
    """Our position encoding behind transformers' interface (theirs counts from 0 and does not normalise)."""

    def forward(self, width: int, height: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        grid = grid_encoding(torch.zeros(1, height, width, dtype=torch.bool), WIDTH, 10_000.0)
        return rearrange(grid, "b h w d -> b (h w) d")


def hybrid_pair(expansion: float) -> tuple[HybridEncoder, RTDetrHybridEncoder]:
    """Our encoder without its projections, and transformers' with the same weights."""
    ours = HybridEncoder((WIDTH,) * 3, WIDTH, encoder_config("hybrid", fusion_expansion=expansion))
    ours.projections = nn.ModuleList(nn.Identity() for _ in range(3))
    stir(ours)
    config = RTDetrConfig(
        encoder_hidden_dim=WIDTH,
        encoder_in_channels=[WIDTH] * 3,
        encode_proj_layers=[2],
        encoder_layers=2,
        encoder_ffn_dim=HIDDEN,
        encoder_attention_heads=HEADS,
        hidden_expansion=expansion,
        dropout=0.0,
    )
    theirs = RTDetrHybridEncoder(config)
    theirs.aifi[0].position_embedding = OurPositions()
    load_layers(ours.layers, theirs.aifi[0].layers, ATTENTION)
    for index in range(2):
        load_convolution(ours.laterals[index], theirs.lateral_convs[index])
        load_fusion(ours.down_fusions[index], theirs.fpn_blocks[index])
        load_convolution(ours.strides[index], theirs.downsample_convs[index])
        load_fusion(ours.up_fusions[index], theirs.pan_blocks[index])
    return ours, theirs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("expansion", [1.0, 0.5])
def test_hybrid_equals_transformers(expansion: float, training: bool) -> None:
    ours, theirs = hybrid_pair(expansion)
    ours.train(training)
    theirs.train(training)
    features = maps_of((WIDTH,) * 3)
    levels = theirs(inputs_embeds=list(features)).last_hidden_state
    expected = torch.cat([rearrange(level, "b d h w -> b (h w) d") for level in levels], dim=1)
    memory = ours(features, padding(whole=True))
    assert memory.level_shapes == SHAPES
    torch.testing.assert_close(memory.tokens, expected, atol=1e-4, rtol=1e-4)
    same_gradients(memory.tokens, expected, features)


def test_hybrid_attention_does_not_look_at_padding() -> None:
    """Without fusion, a padded image gives what it gives alone."""
    encoder = HybridEncoder((6,), WIDTH, encoder_config("hybrid", levels=1)).eval()
    stir(encoder)
    feature = torch.randn(1, 6, 4, 6)
    alone = encoder([feature[..., :3, :4]], torch.zeros(1, 48, 64, dtype=torch.bool))
    mask = torch.ones(1, 64, 96, dtype=torch.bool)
    mask[:, :48, :64] = False
    tokens = encoder([feature], mask).tokens.view(4, 6, WIDTH)[:3, :4]
    torch.testing.assert_close(tokens, alone.tokens.view(3, 4, WIDTH), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(36, 68), (33, 97), (8, 8)])
def test_lite_makes_two_levels_of_maps_of_odd_sides(size: tuple[int, int]) -> None:
    height, width = size
    shapes = tuple((-(-height // stride), -(-width // stride)) for stride in (16, 32))
    encoder = LiteEncoder(CHANNELS[-1:], WIDTH, encoder_config("lite")).eval()
    memory = encoder(maps_of(CHANNELS[-1:], shapes[:1]), torch.zeros(2, height, width, dtype=torch.bool))
    assert memory.level_shapes == shapes
    assert memory.tokens.isfinite().all()


def test_the_mean_of_lite_is_that_of_the_image_without_padding() -> None:
    """What stands in the padding changes only cells that the kernels reach from there."""
    encoder = LiteEncoder(CHANNELS[-1:], WIDTH, encoder_config("lite", fusion_blocks=1)).eval()
    stir(encoder)
    (level,) = maps_of(CHANNELS[-1:], [(40, 40)])
    mask = torch.zeros(2, 640, 640, dtype=torch.bool)
    mask[:, :, 320:] = True
    other = level.clone()
    other[:, :, :, 30:] += 5.0
    first, second = (encoder([one], mask).tokens[:, :1600].reshape(2, 40, 40, WIDTH) for one in (level, other))
    torch.testing.assert_close(first[:, :, :8], second[:, :, :8])
    assert not torch.allclose(first[:, :, 28:], second[:, :, 28:])


@pytest.mark.parametrize("size", [(36, 68), (33, 97), (8, 8)])
def test_hybrid_takes_maps_of_odd_sides(size: tuple[int, int]) -> None:
    height, width = size
    shapes = tuple((-(-height // stride), -(-width // stride)) for stride in (8, 16, 32))
    encoder = HybridEncoder(CHANNELS, WIDTH, encoder_config("hybrid")).eval()
    memory = encoder(maps_of(CHANNELS, shapes), torch.zeros(2, height, width, dtype=torch.bool))
    assert memory.level_shapes == shapes
    assert memory.tokens.isfinite().all()


@pytest.mark.parametrize("kind", ["deformable", "hybrid", "lite", "plain"])
def test_a_image_of_one_pixel_has_a_cell_on_every_level(kind: str) -> None:
    maps = maps_of(CHANNELS)[: 2 if kind == "lite" else 3]
    encoder = build_encoder(CHANNELS[: len(maps)], WIDTH, encoder_config(kind)).eval()
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[:, :1, :1] = False
    memory = encoder(maps, mask)
    assert memory.tokens.isfinite().all()
    assert (~memory.padding_mask).sum(1).tolist() == [encoder.levels] * 2
    torch.testing.assert_close(memory.valid_ratios[0, -1], torch.tensor([1 / 3, 1 / 2]))
