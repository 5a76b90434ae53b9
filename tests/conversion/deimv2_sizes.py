"""The published sizes of DEIMv2: what their configurations set, apart from what all of them share."""

from typing import Any

# HGNetV2 B0, and its three stages for the smallest sizes
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

_PICO: dict[str, Any] = {
    "hidden_sizes": [64, 256, 512],
    "depths": [3, 3, 3],
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256],
    "stage_mid_channels": [16, 32, 64],
    "stage_out_channels": [64, 256, 512],
    "stage_num_blocks": [1, 1, 2],
    "stage_downsample": [False, True, True],
    "stage_light_block": [False, False, True],
    "stage_kernel_size": [3, 3, 5],
    "stage_numb_of_layers": [3, 3, 3],
    "use_learnable_affine_block": True,
    "out_indices": [3],
}
_FEMTO = _PICO | {"stage_num_blocks": [1, 1, 1]}
_ATTO = _FEMTO | {
    "hidden_sizes": [64, 256, 256],
    "stage_out_channels": [64, 256, 256],
    "stage_kernel_size": [3, 3, 3],
}

_TINY: dict[str, Any] = {
    "model_type": "dinov3_vit",
    "num_hidden_layers": 12,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "layerscale_value": 1.0,
    "num_register_tokens": 0,
    "pos_embed_rescale": None,
    "apply_layernorm": False,
    "out_indices": [6, 9, 12],
}
_TINY_PLUS = _TINY | {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "out_indices": [4, 8, 12],
}
_SMALL: dict[str, Any] = {
    "model_type": "dinov3_vit",
    "num_hidden_layers": 12,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "layerscale_value": 1e-5,
    "num_register_tokens": 4,
    "key_bias": True,
    "out_indices": [6, 9, 12],
}
_SMALL_PLUS = _SMALL | {"intermediate_size": 1536, "use_gated_mlp": True}

BACKBONES = {"n": _B0 | {"out_indices": [3, 4]}, "pico": _PICO, "femto": _FEMTO, "atto": _ATTO}
BACKBONES |= {"s": _TINY, "m": _TINY_PLUS, "l": _SMALL, "x": _SMALL_PLUS}
_LITE: dict[str, Any] = {
    "encoder_type": "lite",
    "encoder_layers": 0,
    "encoder_in_channels": [512],
    "feat_strides": [16],
    "num_feature_levels": 2,
    "hidden_expansion": 0.34,
    "depth_mult": 0.5,
    "decoder_layers": 3,
    "decoder_n_points": [4, 2],
    "share_bbox_head": True,
    "use_gateway": False,
}


def _adapted(width: int, encoder: int, decoder: int) -> dict[str, Any]:
    """A size with a vision transformer: channels, and hidden widths of encoder and decoder."""
    return {
        "d_model": width,
        "encoder_hidden_dim": width,
        "encoder_in_channels": [width] * 3,
        "decoder_in_channels": [width] * 3,
        "encoder_ffn_dim": encoder,
        "decoder_ffn_dim": decoder,
        "decoder_n_points": [3, 6, 3],
        "encoder_has_trailing_conv": False,
    }


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
    "pico": _LITE
    | {"d_model": 112, "encoder_hidden_dim": 112, "decoder_in_channels": [112, 112], "decoder_ffn_dim": 320},
    "femto": _LITE | {"d_model": 96, "encoder_hidden_dim": 96, "decoder_in_channels": [96, 96], "decoder_ffn_dim": 256},
    "atto": _LITE
    | {"d_model": 64, "encoder_hidden_dim": 64, "decoder_in_channels": [64, 64], "decoder_ffn_dim": 160}
    | {"encoder_in_channels": [256]},
    "s": _adapted(192, 512, 512) | {"depth_mult": 0.67, "hidden_expansion": 0.34, "decoder_layers": 4},
    "m": _adapted(256, 512, 512) | {"hidden_expansion": 0.67, "decoder_layers": 4},
    "l": _adapted(224, 896, 1792) | {"decoder_layers": 4, "spatial_tuning_adapter_inplanes": 32},
    "x": _adapted(256, 1024, 2048)
    | {"depth_mult": 1.37, "hidden_expansion": 1.25, "decoder_layers": 6, "spatial_tuning_adapter_inplanes": 64},
}
_ALL: dict[str, Any] = {"decoder_activation_function": "silu", "eval_size": [640, 640], "num_queries": 30}


def config_of(size: str, names: tuple[str, ...], **changes: object) -> Any:
    """The configuration of a size, with few queries and perhaps other options."""
    from transformers import AutoConfig, Deimv2Config

    labels = dict(enumerate(names))
    values = {
        "backbone_config": AutoConfig.for_model(**{"model_type": "hgnet_v2"} | BACKBONES[size]),
        "id2label": labels,
        "label2id": {name: label for label, name in labels.items()},
    }
    return Deimv2Config(**_ALL | values | SIZES[size] | changes)
