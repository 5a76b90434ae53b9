"""The decoder whose layers refine distributions of edges: what it predicts untrained, and that all of it trains."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.models.config import DecoderConfig, DetectorConfig, DistributionConfig
from metr.models.detector import Detector
from metr.models.distribution_decoder import DistributionDecoder, EdgeShifts, shifted
from metr.models.encoders.pyramid import flatten
from metr.structures import Memory, Queries

from small import TEXT_WIDTH, small_config, targets_of

TEXT = torch.nn.functional.normalize(torch.randn(9, TEXT_WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
WIDTH, LAYERS = 32, 3


def config_of(**options: object) -> DecoderConfig:
    values = {"kind": "distribution", "layers": LAYERS, "heads": 4, "points": 2, "feed_forward": 24} | options
    return DecoderConfig.model_validate(values)


def decoder_of(stirred: bool = True, **options: object) -> DistributionDecoder:
    torch.manual_seed(2)
    decoder = DistributionDecoder(WIDTH, 3, config_of(**options), 0.01, TEXT_WIDTH).eval()
    if stirred:
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def memory_of(height: int = 64, width: int = 96, padded: bool = False) -> Memory:
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[1, 40:] = padded
    return flatten([torch.randn(2, WIDTH, height // stride, width // stride) for stride in (8, 16, 32)], mask)


def queries_of(number: int = 5) -> Queries:
    slot = torch.arange(number).expand(2, -1) % 2
    boxes = 0.3 + 0.4 * torch.rand(2, number, 4)
    content = torch.randn(2, number, WIDTH)
    return Queries(content=content, reference_boxes=boxes, slot=slot, group=slot, valid=slot >= 0)


def detector_of(predictors: str = "layer", **options: object) -> Detector:
    decoder = config_of(layers=2, predictors=predictors, **options).model_dump()
    config = small_config(encoder="hybrid").model_dump() | {"decoder": decoder}
    torch.manual_seed(3)
    return Detector(DetectorConfig.model_validate(config), TEXT_WIDTH)


@torch.no_grad()
def test_untrained_it_changes_no_box_and_knows_no_quality() -> None:
    queries = queries_of()
    decoded = decoder_of(stirred=False)(queries, memory_of())
    assert decoded.features.shape == (LAYERS + 1, 2, 5, WIDTH)
    assert decoded.quality is not None
    torch.testing.assert_close(decoded.boxes, queries.reference_boxes.expand(LAYERS + 1, -1, -1, -1))
    assert torch.equal(decoded.quality, torch.zeros(LAYERS + 1, 2, 5))
    # the first layer's two outputs are made of the same features, and asked by the same head
    assert torch.equal(decoded.features[0], decoded.features[1])


@pytest.mark.parametrize(("bins", "reach", "flatness"), [(32, 0.5, 4.0), (16, 0.25, 8.0), (4, 1.0, 1.0)])
def test_possible_shifts(bins: int, reach: float, flatness: float) -> None:
    values = EdgeShifts(DistributionConfig(bins=bins, reach=reach, flatness=flatness)).values()
    assert len(values) == bins + 1
    assert bool((values.diff() > 0).all())
    torch.testing.assert_close(values, -values.flip(0))
    torch.testing.assert_close(values[-2:], torch.tensor([reach, 2 * reach]))


def test_a_sure_edge_moves_by_its_shift() -> None:
    shifts = EdgeShifts(DistributionConfig(bins=4, reach=0.5))
    logits = torch.full((4, 5), -1e4)
    for edge, likely in enumerate((2, 4, 3, 1)):
        logits[edge, likely] = 0
    torch.testing.assert_close(shifts(logits), torch.tensor([0.0, 1.0, 0.5, -0.5]))
    # left stays, the top moves up by a height, the right moves right by half a width, the bottom up by half a height
    moved = shifted(torch.tensor([0.5, 0.5, 0.2, 0.1]), shifts(logits))
    torch.testing.assert_close(moved, torch.tensor([0.55, 0.425, 0.3, 0.15]))


@torch.no_grad()
def test_layers_ask_by_their_own_heads() -> None:
    decoder = decoder_of(predictors="layer")
    queries = queries_of()
    decoded = decoder(queries, memory_of())
    tokens = torch.randn(2, 2, WIDTH)
    logits = decoder.ask(decoded, tokens, queries.slot)
    quality = decoded.quality
    assert quality is not None
    own = tokens.gather(1, queries.slot.unsqueeze(-1).expand(-1, -1, WIDTH))
    heads = list(decoder.similarity)
    for output, head in enumerate([heads[0], *heads]):
        torch.testing.assert_close(logits[output], head(decoded.features[output], own) + quality[output])
    assert float(quality[1:].std()) > 1e-3


@torch.no_grad()
def test_another_image_of_the_batch_and_padding_change_nothing() -> None:
    decoder, queries, memory = decoder_of(), queries_of(), memory_of(padded=True)
    both = decoder(queries, memory)
    for image in range(2):
        one = slice(image, image + 1)
        alone = decoder(
            Queries(**{name: part[one] for name, part in vars(queries).items() if part is not None}),
            Memory(
                tokens=memory.tokens[one].masked_fill(memory.padding_mask[one].unsqueeze(-1), 7.0),
                padding_mask=memory.padding_mask[one],
                level_shapes=memory.level_shapes,
                valid_ratios=memory.valid_ratios[one],
            ),
        )
        torch.testing.assert_close(alone.features[:, 0], both.features[:, image], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.boxes[:, 0], both.boxes[:, image], atol=1e-5, rtol=0)


DEIMV2: dict[str, object] = {
    "norm": "rms",
    "activation": "swiglu",
    "gate": False,
    "positions": "plain",
    "position_layers": 3,
    "position_activation": "silu",
    "distribution": {"shared": True},
}


@pytest.mark.parametrize("predictors", ["layer", "shared"])
@pytest.mark.parametrize("boxes", [[[0.4, 0.5, 0.3, 0.4]], []])
@pytest.mark.parametrize("options", [{}, DEIMV2], ids=["d_fine", "deimv2"])
def test_every_parameter_gets_a_gradient(predictors: str, boxes: list[list[float]], options: dict[str, object]) -> None:
    detector = detector_of(predictors, **options).train()
    targets = targets_of(boxes, [4] * len(boxes), words=9)
    output = detector(torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool), TEXT, targets)
    assert output.logits.shape[0] == output.boxes.shape[0] == 3
    loss: Tensor = SetCriterion(CriterionConfig())(output, targets)[0].total
    loss.backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


def test_later_layers_teach_earlier_distributions_and_no_earlier_box() -> None:
    decoder = decoder_of()
    decoder(queries_of(), memory_of()).boxes[-1].square().sum().backward()
    assert float(decoder.distributions[0].last.bias.grad.abs().sum()) > 0
    assert float(decoder.box.change.last.bias.grad.abs().sum()) == 0


@torch.no_grad()
def test_boxes_keep_their_precision_in_half_of_it() -> None:
    decoder, queries, memory = decoder_of(stirred=False), queries_of(), memory_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = decoder(queries, memory)
    assert decoded.boxes.dtype == torch.float32
    torch.testing.assert_close(decoded.boxes[-1], queries.reference_boxes, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "deformable", "gate": False}, "gate is for kind 'distribution'; with 'deformable' leave it at True"),
        ({"kind": "conditional", "norm": "rms"}, "norm is for kind 'distribution'"),
        ({"kind": "deformable", "activation": "swiglu"}, "activation 'swiglu' is for kind 'distribution'"),
        ({"position_layers": 3}, "position_layers is for positions 'plain'; otherwise leave it at 2"),
        ({"position_activation": "silu"}, "position_activation is for positions 'plain'"),
    ],
)
def test_options_of_another_kind_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of(**options)


def test_lite_takes_one_map_of_the_backbone() -> None:
    config = small_config(encoder="hybrid").model_dump()
    with pytest.raises(ValidationError, match=r"'lite' makes two levels of one backbone map: .*expected one of"):
        DetectorConfig.model_validate(config | {"encoder": config["encoder"] | {"kind": "lite"}})
