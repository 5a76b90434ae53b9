"""D-FINE and RT-DETRv2 whose points METR does not have so: padded, rescaled, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import NAMES, alike, save_folder, stir, stirred, texts
from torch import Tensor

from metr.conversion.convert import TransferReport
from metr.conversion.export import build_spec_for, transfer
from metr.conversion.import_ import adopt, read_published
from metr.conversion.targets import find_target
from metr.errors import ModelError
from metr.models.detector import Detector

SHAPES = ((8, 12), (4, 6), (2, 3))


def detector(name: str, **changes: object) -> Any:
    """A detector of transformers with options that METR's transfer would not give it."""
    from transformers import AutoModelForObjectDetection

    target, network = find_target(name), stirred(alike(name))
    points = changes.get("decoder_n_points")
    if isinstance(points, list) and len(points) == 2:
        network = stirred(alike(name, levels=2))
    config = target.configure(build_spec_for(target, network, NAMES))
    for option, value in changes.items():
        setattr(config, option, value)
    torch.manual_seed(4)
    auto: Any = AutoModelForObjectDetection
    return stir(auto.from_config(config)).eval()


def adopted(model: Any, name: str, folder: Path) -> tuple[Detector, TransferReport]:
    save_folder(model, name, stirred(alike(name)), folder)
    return adopt(read_published(folder), texts())


@torch.no_grad()
def seen(network: Detector, model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """What both attentions to the memory gather for the same queries and boxes."""
    levels, width = network.config.encoder.levels, network.config.width
    shapes = SHAPES[:levels]
    torch.manual_seed(5)
    tokens, query = torch.randn(2, sum(h * w for h, w in shapes), width), torch.randn(2, 7, width)
    boxes = torch.rand(2, 7, 4) * 0.6 + 0.2
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    reference = boxes.unsqueeze(2)
    ours = network.decoder.layers[layer].cross(query, reference.expand(-1, -1, levels, -1), tokens, padding, shapes)
    theirs, _ = model.model.decoder.layers[layer].encoder_attn(
        query,
        reference_points=reference,
        encoder_hidden_states=tokens,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=list(shapes),
    )
    return ours, theirs


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [
        ("d_fine", {"decoder_n_points": [3, 6, 3]}, 6),
        ("d_fine", {"decoder_n_points": [6, 6]}, 6),
        ("d_fine", {"decoder_n_points": [2, 2, 2]}, 2),
        ("d_fine", {"decoder_n_points": [1, 2, 4], "decoder_offset_scale": 0.25}, 4),
        ("rt_detr_v2", {"decoder_offset_scale": 0.25}, 2),
    ],
)
def test_the_same_places_are_sampled(name: str, changes: dict[str, Any], most: int, tmp_path: Path) -> None:
    model = detector(name, **changes)
    network, report = adopted(model, name, tmp_path)
    assert network.config.decoder.points == most
    for layer in range(2):
        ours, theirs = seen(network, model, layer)
        assert float(theirs.std()) > 1e-2
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    made = {moved.key: moved for moved in report.reshaped if ".cross.offsets." in moved.key}
    if changes == {"decoder_n_points": [3, 6, 3]}:
        moved = made["decoder.layers.0.cross.offsets.weight"]
        assert moved.how == "padded to 6 points a level"
        assert moved.source == ("model.decoder.layers.0.encoder_attn.sampling_offsets.weight",)
    assert bool(made) == (changes.get("decoder_n_points") not in ([2, 2, 2], [6, 6]))


@torch.no_grad()
def test_added_points_weigh_nothing_in_half_precision_too(tmp_path: Path) -> None:
    network, _ = adopted(detector("d_fine", decoder_n_points=[3, 6, 3]), "d_fine", tmp_path)
    cross = network.decoder.layers[0].cross
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.nn.functional.linear(
            torch.randn(5, 32).to(dtype), *(p.to(dtype) for p in cross.weights.parameters())
        )
        weights = logits.view(5, cross.heads, -1).softmax(-1).view(5, cross.heads, 3, 6)
        assert bool(weights.isfinite().all())
        assert bool((weights[:, :, (0, 2), 3:] == 0).all())
        assert bool((weights[:, :, (0, 2), :3] > 0).all())


def test_it_trains_on(tmp_path: Path) -> None:
    network, _ = adopted(detector("d_fine", decoder_n_points=[3, 6, 3]), "d_fine", tmp_path)
    cross = network.decoder.layers[0].cross.train()
    shapes = SHAPES
    tokens = torch.randn(1, sum(h * w for h, w in shapes), 32)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    cross(torch.randn(1, 4, 32), torch.rand(1, 4, 3, 4), tokens, padding, shapes).square().sum().backward()
    for parameter in cross.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def test_padded_points_go_on_to_another_d_fine(tmp_path: Path) -> None:
    model = detector("d_fine", decoder_n_points=[3, 6, 3])
    network, _ = adopted(model, "d_fine", tmp_path)
    again = transfer(find_target("d_fine"), network, NAMES, texts()).model
    assert again.config.decoder_n_points == 6
    for layer in range(2):
        torch.testing.assert_close(seen(network, again, layer)[1], seen(network, model, layer)[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_places_that_are_rounded_are_refused(name: str, tmp_path: Path) -> None:
    save_folder(detector(name, decoder_method="discrete"), name, stirred(alike(name)), tmp_path)
    with pytest.raises(ModelError, match="needs decoder_method = 'default', found 'discrete'") as error:
        read_published(tmp_path)
    assert "decoder_method = 'default'" in str(error.value.hint)
