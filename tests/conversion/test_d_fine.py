"""D-FINE in its published sizes becomes METR, and METR becomes D-FINE: the same features, boxes and qualities."""

from typing import Any

import pytest
import torch
from conversion_cases import NAMES, alike, stirred, texts
from d_fine_sizes import SIZES, config_of
from refined_boxes import adopted, agree, enlivened

from metr.conversion.export import transfer
from metr.conversion.targets import find_target
from metr.errors import ModelError
from metr.models.config import DecoderConfig

TARGET = find_target("d_fine")
# the larger ones take seconds to build
PUBLISHED = [size if size == "n" else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]


def published(size: str, **changes: object) -> Any:
    """A D-FINE of a published size with random weights."""
    from transformers import DFineForObjectDetection

    config = config_of(size, NAMES, **changes)
    torch.manual_seed(3)
    return enlivened(DFineForObjectDetection(config))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_there_and_back(size: str) -> None:
    model = published(size)
    network, report = adopted(TARGET, model)
    agree(network, model)
    for key in report.left_over:
        assert "class_embed" in key or "enc_score_head" in key or key.endswith(("tracked", "points_scale")), key
    again = transfer(TARGET, network, NAMES, texts()).model
    agree(network, again)


SMALL: dict[str, Any] = {
    "backbone_config": {
        "model_type": "hgnet_v2",
        "hidden_sizes": [8, 16, 24, 32],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 24],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "use_learnable_affine_block": True,
        "out_indices": [3, 4],
    },
    "encoder_in_channels": [24, 32],
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32],
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_n_points": [2, 4], "decoder_offset_scale": 0.25},
        {"encoder_hidden_dim": 48, "decoder_in_channels": [48, 48]},
        {"max_num_bins": 16, "up": 0.25, "reg_scale": 8.0, "top_prob_values": 3, "lqe_hidden_dim": 24, "lqe_layers": 3},
        {"eval_idx": 1},
        {"eval_size": 640},
    ],
    ids=["points", "encoder's width", "distributions", "last layer by its number", "no positions"],
)
def test_options_that_published_sizes_may_set(changes: dict[str, Any]) -> None:
    model = published("n", **SMALL | changes)
    network, _ = adopted(TARGET, model)
    agree(network, model)
    agree(network, transfer(TARGET, network, NAMES, texts()).model)


def test_weights_go_before_an_older_configuration() -> None:
    model = published("n", **SMALL, reg_scale=8.0)
    model.config.reg_scale = 4.0
    network, _ = adopted(TARGET, model)
    assert network.config.decoder.distribution.flatness == float(model.model.decoder.reg_scale)
    agree(network, model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eval_idx": 0}, "eval_idx"),
        ({"normalize_before": True}, "normalize_before"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
)
def test_options_without_a_counterpart_are_refused(changes: dict[str, Any], named: str) -> None:
    model = published("n", **SMALL)
    for option, value in changes.items():
        setattr(model.config, option, value)
    with pytest.raises(ModelError, match=f"needs {named} = "):
        adopted(TARGET, model)


def test_a_metr_that_refines_boxes_otherwise_gives_what_fits() -> None:
    config = alike("d_fine")
    plain = DecoderConfig.model_validate(config.decoder.model_dump() | {"kind": "deformable"})
    report = transfer(TARGET, stirred(config.model_copy(update={"decoder": plain})), NAMES, texts()).report
    moved = {moved.key for moved in report.copied}
    assert {"model.decoder.layers.1.gateway.norm.weight", "model.decoder.pre_bbox_head.layers.2.weight"} <= moved
    assert "model.decoder.layers.1.gateway.gate.weight" in report.afresh
    assert any("distributions" in note for note in report.notes)
    whole = transfer(TARGET, stirred(config), NAMES, texts()).report
    assert not any("distributions" in note for note in whole.notes)
