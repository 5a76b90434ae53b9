"""Small METRs whose layers are those of other detectors, with weights and norms that no zero or one hides."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metr.conversion.export import colours_of
from metr.conversion.published.dino import AUTHORS
from metr.conversion.published.timm import resnet_rows
from metr.conversion.table import to_theirs
from metr.conversion.targets import find_target
from metr.data.config import ResizeConfig
from metr.models.config import (
    BackboneConfig,
    CategoryConfig,
    DecoderConfig,
    DenoisingConfig,
    DetectorConfig,
    EncoderConfig,
    QueryConfig,
)
from metr.models.detector import Detector

from small import TEXT_WIDTH, small_backbone

NAMES = ("penguin", "shark", "puffin")
SIDE = 64
PROJECTING = ("lw_detr", "rf_detr")


def windowed_backbone(target: str) -> BackboneConfig:
    """The backbone of LW-DETR or RF-DETR, with 4 windows and a patch of 8 pixels."""
    options = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    if target == "lw_detr":
        options |= {"num_windows": 4, "window_block_indices": [0, 2], "pretrain_image_size": 32}
    else:
        options |= {"num_windows": 2}
    name = {"lw_detr": "lw_detr_vit", "rf_detr": "rf_detr_dinov2"}[target]
    return BackboneConfig(name=name, pretrained=False, freeze_stages=0, layers=(1, 2, 4), options=options)


def projecting(target: str, **encoder: object) -> DetectorConfig:
    """A METR with the same layers as LW-DETR or RF-DETR."""
    options: dict[str, object] = {"kind": "projector", "heads": 4, "fusion_blocks": 2, "fusion_expansion": 0.5}
    options |= {"scales": (2.0, 1.0, 0.5)} if target == "lw_detr" else {"norm": "layer", "norm_eps": 1e-6}
    return DetectorConfig(
        width=32,
        backbone=windowed_backbone(target),
        encoder=EncoderConfig(**(options | encoder)),
        categories=CategoryConfig(blocks=1, heads=4, feed_forward=32, kept=3),
        queries=QueryConfig(number=9, floor=2, ceiling=9, layout="uniform", attention="image", start="shifted"),
        denoising=DenoisingConfig(number=6),
        decoder=DecoderConfig(
            layers=2,
            heads=4,
            cross_heads=8,
            points=2,
            feed_forward=40,
            padded_positions=True,
            boxes="reparametrised",
            refine="none",
        ),
    )


def adapted() -> BackboneConfig:
    """A DINOv3 of four layers with an adapter beside it."""
    options = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return BackboneConfig(
        name="dinov3_vit",
        pretrained=False,
        freeze_stages=0,
        strides=(8, 16, 32),
        layers=(1, 3, 4),
        adapter=4,
        options=options | {"num_register_tokens": 2},
    )


def alike(target: str, **encoder: object) -> DetectorConfig:
    """A METR with the same layers as a target, or with other options of its encoder."""
    if target in PROJECTING:
        return projecting(target, **encoder)
    deformable, refining = target == "deformable_detr", target in ("d_fine", "deimv2")
    # the group norms of Deformable DETR have 32 groups, as METR's from this width on
    width = 128 if deformable else 32
    options: dict[str, object] = {"layers": 2 if deformable else 1, "heads": 4, "feed_forward": 48, "points": 2}
    if deformable:
        options |= {"kind": "deformable", "levels": 4, "positions": "centred"}
    else:
        options |= {"kind": "hybrid", "levels": 3, "positions": "counted", "fusion_blocks": 3}
        options |= {"fusion": "elan", "fusion_blocks": 1} if refining else {"project_memory": True}
    layers: dict[str, object] = {"kind": "distribution"} if refining else {}
    if target == "deimv2":
        options |= {"fusion_inputs": "sum"}
        layers |= {"norm": "rms", "activation": "swiglu", "position_layers": 3, "position_activation": "silu"}
    positions, backbone = "sine" if deformable else "plain", small_backbone()
    if encoder.get("kind") == "lite":
        backbone = backbone.model_copy(update={"strides": (16,)})
    return DetectorConfig(
        width=width,
        backbone=backbone,
        encoder=EncoderConfig(**(options | encoder)),
        categories=CategoryConfig(blocks=1, heads=4, feed_forward=32, kept=3),
        queries=QueryConfig(number=9, floor=2, ceiling=9, layout="uniform", attention="image"),
        denoising=DenoisingConfig(number=6),
        decoder=DecoderConfig(layers=2, heads=4, points=2, feed_forward=32, positions=positions, **layers),
    )


def stirred(config: DetectorConfig, seed: int = 0) -> Detector:
    """A network with random weights, biases and norms."""
    torch.manual_seed(seed)
    return stir(Detector(config, TEXT_WIDTH)).eval()


@torch.no_grad()
def stir(network: nn.Module, by: float = 0.1) -> nn.Module:
    """Moves every parameter and every statistic of a norm off its start; large networks want less."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * by)
    for key, buffer in network.named_buffers():
        if key.endswith(("running_mean", "bias")):
            buffer.add_(torch.randn_like(buffer) * 0.1)
        elif key.endswith(("running_var", "weight")):
            buffer.mul_(0.5 + torch.rand_like(buffer))
    return network


def random_images(number: int = 2, seed: int = 1, width: int = SIDE + 32) -> Tensor:
    """Random images in 0..1."""
    torch.manual_seed(seed)
    return torch.rand(number, 3, SIDE, width)


def normalised(network: Detector, images: Tensor) -> Tensor:
    """Images as detectors of transformers get them."""
    return (images - network.backbone.mean) / network.backbone.std


def maps_of(model: Any, pixels: Tensor, mask: Tensor) -> list[Tensor]:
    """What the backbone of a detector of transformers gives for images and a mask of what is no padding."""
    if model.config.model_type == "deimv2":
        encoder, seen = model.model.conv_encoder, list[Tensor]()
        projections = getattr(encoder, "fusion_proj", None) or encoder.encoder_input_proj
        hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in projections]
        encoder(pixels)
        for hook in hooks:
            hook.remove()
        return seen
    return [found for found, _ in model.model.backbone(pixels, mask)]


def texts(number: int = len(NAMES)) -> Tensor:
    """Text embeddings."""
    torch.manual_seed(2)
    return nn.functional.normalize(torch.randn(number, TEXT_WIDTH), dim=-1)


def save_folder(model: Any, name: str, network: Detector, folder: Path) -> None:
    """Writes a detector of transformers with the image processor that a METR gives its target."""
    model.save_pretrained(folder)
    find_target(name).image_processor(ResizeConfig(size=SIDE), colours_of(network)).save_pretrained(folder)


def dino_like(authors: bool, labels: int = 91) -> tuple[Detector, dict[str, Tensor]]:
    """A METR with a bottleneck ResNet, and its weights under the names of DINO or of METR's authors.

    DINO's heads, and its copies of the box head, are added as its files have them.
    """
    options = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 1], "layer_type": "bottleneck"}
    config = DetectorConfig(
        width=32,
        backbone=BackboneConfig(name="resnet", pretrained=False, options=options),
        encoder=EncoderConfig(layers=2, levels=4, heads=4, points=2, feed_forward=48),
        decoder=DecoderConfig(layers=2, heads=4, points=3, feed_forward=40, padded_positions=True),
    )
    torch.manual_seed(0)
    network = stir(Detector(config, TEXT_WIDTH)).eval()
    state = to_theirs(network.state_dict(), (*AUTHORS, *resnet_rows("backbone.0.body.", "backbone.network."))).state
    if authors:
        state["transformer.prompt_indicator.class_prompts"] = torch.randn(2, TEXT_WIDTH)
        return network, state
    for_names = ("transformer.prompt_indicator.", "class_embed.", "num_classes", "transformer.enc_out_class_embed.")
    state = {key: tensor for key, tensor in state.items() if not key.startswith(for_names)}
    state |= {
        "label_enc.weight": torch.randn(labels + 1, 32),
        "transformer.tgt_embed.weight": torch.randn(12, 32),
        "transformer.enc_out_class_embed.weight": torch.randn(labels, 32),
        "transformer.enc_out_class_embed.bias": torch.randn(labels),
        "class_embed.0.weight": torch.randn(labels, 32),
        "class_embed.0.bias": torch.randn(labels),
    }
    heads = {key: tensor for key, tensor in state.items() if key.startswith(("class_embed.0", "bbox_embed.0"))}
    for key, tensor in heads.items():
        state[key.replace("_embed.0", "_embed.1")] = tensor
        for layer in range(2):
            state[f"transformer.decoder.{key.replace('_embed.0', f'_embed.{layer}')}"] = tensor.clone()
    return network, state
