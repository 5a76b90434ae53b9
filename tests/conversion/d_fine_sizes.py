"""The published sizes of D-FINE: what their configurations set, apart from what all of them share."""

from typing import Any

# HGNetV2 B0, B2, B4 and B5
_B0: dict[str, Any] = {
    "hidden_sizes": [128, 256, 512, 1024],
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
}
_B2: dict[str, Any] = {
    "hidden_sizes": [192, 384, 768, 1536],
    "stem_channels": [3, 24, 32],
    "stage_in_channels": [32, 96, 384, 768],
    "stage_mid_channels": [32, 64, 128, 256],
    "stage_out_channels": [96, 384, 768, 1536],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [4, 4, 4, 4],
    "use_learnable_affine_block": True,
}
_B4: dict[str, Any] = {
    "hidden_sizes": [256, 512, 1024, 2048],
    "stem_channels": [3, 32, 48],
    "stage_in_channels": [48, 128, 512, 1024],
    "stage_mid_channels": [48, 96, 192, 384],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [6, 6, 6, 6],
}
_B5: dict[str, Any] = {
    "hidden_sizes": [256, 512, 1024, 2048],
    "stem_channels": [3, 32, 64],
    "stage_in_channels": [64, 128, 512, 1024],
    "stage_mid_channels": [64, 128, 256, 512],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 2, 5, 2],
    "stage_numb_of_layers": [6, 6, 6, 6],
}

BACKBONES = {"n": _B0, "s": _B0, "m": _B2, "l": _B4, "x": _B5}

SIZES: dict[str, dict[str, Any]] = {
    "n": {
        "d_model": 128,
        "encoder_hidden_dim": 128,
        "encoder_in_channels": [512, 1024],
        "encoder_ffn_dim": 512,
        "encode_proj_layers": [1],
        "feat_strides": [16, 32],
        "num_feature_levels": 2,
        "hidden_expansion": 0.34,
        "depth_mult": 0.5,
        "decoder_in_channels": [128, 128],
        "decoder_ffn_dim": 512,
        "decoder_layers": 3,
        "decoder_n_points": [6, 6],
    },
    "s": {
        "encoder_in_channels": [256, 512, 1024],
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
        "decoder_layers": 3,
        "decoder_n_points": [3, 6, 3],
    },
    "m": {
        "encoder_in_channels": [384, 768, 1536],
        "depth_mult": 0.67,
        "decoder_layers": 4,
        "decoder_n_points": [3, 6, 3],
    },
    "l": {"encoder_in_channels": [512, 1024, 2048], "decoder_layers": 6, "decoder_n_points": [3, 6, 3]},
    "x": {
        "encoder_hidden_dim": 384,
        "encoder_in_channels": [512, 1024, 2048],
        "encoder_ffn_dim": 2048,
        "decoder_in_channels": [384, 384, 384],
        "decoder_layers": 6,
        "decoder_n_points": [3, 6, 3],
        "reg_scale": 8.0,
    },
}


def config_of(size: str, names: tuple[str, ...], **changes: object) -> Any:
    """The configuration of a size, with few queries and perhaps other options."""
    from transformers import DFineConfig, HGNetV2Config

    indices = [3, 4] if size == "n" else [2, 3, 4]
    labels = dict(enumerate(names))
    values = {
        "backbone_config": HGNetV2Config(**BACKBONES[size], out_indices=indices),
        "num_queries": 30,
        "id2label": labels,
        "label2id": {name: label for label, name in labels.items()},
    }
    return DFineConfig(**values | SIZES[size] | changes)
