"""DEIMv2 in its published sizes becomes METR, and METR becomes DEIMv2: the same features, boxes and qualities."""

from typing import Any

import pytest
import torch
from conversion_cases import NAMES, alike, stirred, texts
from deimv2_sizes import SIZES, config_of
from refined_boxes import adopted, agree, enlivened

from metr.conversion.activation_statistics import box_position
from metr.conversion.export import transfer
from metr.conversion.targets import find_target
from metr.errors import ModelError
from metr.models.config import DecoderConfig

TARGET = find_target("deimv2")
# the others take many seconds to build; small ones with their options are below
PUBLISHED = [size if size in ("n", "atto") else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]


def published(size: str, **changes: object) -> Any:
    """A DEIMv2 of a published size with random weights."""
    from transformers import Deimv2ForObjectDetection

    config = config_of(size, NAMES, **changes)
    torch.manual_seed(3)
    return enlivened(Deimv2ForObjectDetection(config))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_there_and_back(size: str) -> None:
    model = published(size)
    network, report = adopted(TARGET, model)
    agree(network, model)
    for key in report.left_over:
        assert "class_embed" in key or "enc_score_head" in key or key.endswith(("tracked", "points_scale")), key
    agree(network, transfer(TARGET, network, NAMES, texts()).model)


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
    "decoder_layers": 3,
}


ADAPTED: dict[str, Any] = {
    "backbone_config": {
        "model_type": "dinov3_vit",
        "num_hidden_layers": 4,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_register_tokens": 2,
        "apply_layernorm": False,
        "out_indices": [1, 3, 4],
    },
    "encoder_in_channels": [32, 32, 32],
    "decoder_in_channels": [32, 32, 32],
    "feat_strides": [8, 16, 32],
    "encode_proj_layers": [2],
    "num_feature_levels": 3,
    "decoder_n_points": [3, 6, 3],
    "encoder_has_trailing_conv": False,
    "spatial_tuning_adapter_inplanes": 4,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_gateway": False},
        {"share_bbox_head": True},
        {"encoder_has_trailing_conv": False},
        {"decoder_activation_function": "relu", "eval_size": None},
        {"encoder_hidden_dim": 48, "decoder_in_channels": [48, 48]},
        {"max_num_bins": 16, "up": 0.25, "reg_scale": 8.0, "top_prob_values": 3, "lqe_hidden_dim": 24, "lqe_layers": 3},
        ADAPTED,
        ADAPTED | {"backbone_config": ADAPTED["backbone_config"] | {"apply_layernorm": True, "use_gated_mlp": True}},
    ],
    ids=[
        "no gate",
        "one head",
        "no convolutions",
        "positions",
        "encoder's width",
        "distributions",
        "adapter",
        "adapter behind a norm",
    ],
)
def test_options_that_published_sizes_may_set(changes: dict[str, Any]) -> None:
    model = published("n", **SMALL | changes)
    network, report = adopted(TARGET, model)
    agree(network, model)
    assert all(
        key.startswith(("category_extraction.", "denoising.", "proposals.", "decoder.")) for key in report.afresh
    )
    agree(network, transfer(TARGET, network, NAMES, texts()).model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eval_idx": 0}, "eval_idx"),
        ({"encoder_fuse_op": "cat"}, "encoder_fuse_op"),
        ({"decoder_activation_function": "gelu"}, "decoder_activation_function"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
)
def test_options_without_a_counterpart_are_refused(changes: dict[str, Any], named: str) -> None:
    model = published("n", **SMALL)
    for option, value in changes.items():
        setattr(model.config, option, value)
    with pytest.raises(ModelError, match=f"needs {named} = "):
        adopted(TARGET, model)


@torch.no_grad()
def test_positions_of_another_metr_are_fitted() -> None:
    """METR's sines and cosines, and D-FINE's two layers, as DEIMv2's three layers; and DEIMv2's as D-FINE's two."""
    boxes = torch.rand(50, 4) * 0.6 + 0.2
    for ours, target, positions in (
        ("deimv2", "deimv2", {"positions": "sine"}),
        ("d_fine", "deimv2", {}),
        ("deimv2", "d_fine", {}),
    ):
        config = alike(ours)
        changes = positions and {**positions, "position_layers": 2, "position_activation": "relu"}
        decoder = DecoderConfig.model_validate(config.decoder.model_dump() | changes)
        network = stirred(config.model_copy(update={"decoder": decoder}))
        done = transfer(find_target(target), network, NAMES, texts())
        wanted = (box_position(network) or network.decoder.position)(boxes)
        found = done.model.model.decoder.query_pos_head(boxes)
        share = 1 - (found - wanted).var() / wanted.var()
        assert share > 0.5, (ours, target, float(share))
        assert "model.decoder.query_pos_head.layers.0.weight" not in done.report.afresh


def test_what_differs_is_told() -> None:
    notes = transfer(TARGET, stirred(alike("d_fine")), NAMES, texts()).report.notes
    assert any("fusions add two levels" in note for note in notes)
    assert any("norms without a mean" in note for note in notes)
    notes = transfer(find_target("d_fine"), stirred(alike("deimv2")), NAMES, texts()).report.notes
    assert any("fusions concatenate two levels" in note for note in notes)
    assert any("layer norms" in note for note in notes)
    notes = transfer(TARGET, stirred(alike("deimv2")), NAMES, texts()).report.notes
    assert not any("this METR" in note for note in notes[1:])


def test_vision_transformers_that_the_adapter_does_not_fit_are_refused() -> None:
    model = published("n", **SMALL | ADAPTED)
    model.config.backbone_config.patch_size = 8
    with pytest.raises(ModelError, match="needs patch_size = 16"):
        adopted(TARGET, model)
    model.config.backbone_config.patch_size = 16
    model.config.feat_strides = [4, 8, 16]
    with pytest.raises(ModelError, match=r"needs three layers at strides \[8, 16, 32\]"):
        adopted(TARGET, model)


def test_other_detectors_have_no_adapter() -> None:
    network, _ = adopted(TARGET, published("n", **SMALL | ADAPTED))
    with pytest.raises(ModelError, match="only DEIMv2 has maps of a vision transformer with an adapter") as error:
        transfer(find_target("d_fine"), network, NAMES, texts())
    assert "transfer to deimv2" in str(error.value.hint)
