"""Layers of RT-DETR's encoder that a METR lacks, made so that they change nothing."""

import torch
from torch import Tensor

from metr.conversion.activation_statistics import ActivationStatistics, inside_fusion, of_memory, of_norms
from metr.conversion.targets.base import Derived
from metr.models.detector import Detector
from metr.models.encoders.hybrid import ConvNorm, Fusion, HybridEncoder

# convolution blocks of each fusion, which RT-DETR's configuration cannot change
BLOCKS = 3
# how far a block is shifted so that its SiLU lets everything pass: SiLU(x + 12) is x + 12 within 1e-4
_SHIFT = 12.0
_ENCODER = "model.encoder"


def memory_projection(network: Detector, encoder: HybridEncoder) -> dict[str, Derived]:
    """RT-DETR projects and normalises the memory once more: made to change nothing.

    The norm expects what the weights say of each channel, so that in training too, where it looks at the batch, it
    changes little.
    """
    fresh: dict[str, Derived] = {}
    how = "identity"
    for level, statistics in enumerate(of_memory(encoder)):
        key = f"model.decoder_input_proj.{level}"
        eye = torch.eye(encoder.width)[:, :, None, None]
        fresh[f"{key}.0.weight"] = Derived(tensor=eye, how=how)
        source = of_norms(network, statistics)
        for name, value in _unmoved(statistics).items():
            fresh[f"{key}.1.{name}"] = Derived(tensor=value, how=how, source=source)
    return fresh


def _unmoved(statistics: ActivationStatistics, shift: float = 0.0, eps: float = 1e-5) -> dict[str, Tensor]:
    """A batch norm that gives what it is given, or that and a shift."""
    deviation = statistics.deviation.clamp(min=1e-2)
    return {
        "weight": (deviation**2 + eps).sqrt(),
        "bias": statistics.mean + shift,
        "running_mean": statistics.mean,
        "running_var": deviation**2,
    }


def passing_blocks(network: Detector, encoder: HybridEncoder) -> dict[str, Derived]:
    """Blocks that METR's fusions lack: all passes through them, but for a shift that the convolution after them takes.

    A fusion without that convolution keeps the blocks as they were initialised.
    """
    fresh: dict[str, Derived] = {}
    for name, fusions in (("fpn_blocks", encoder.down_fusions), ("pan_blocks", encoder.up_fusions)):
        for number, fusion in enumerate(fusions):
            if not (isinstance(fusion, Fusion) and isinstance(fusion.out, ConvNorm)):
                continue
            lacking = range(len(fusion.blocks), BLOCKS)
            if not lacking:
                continue
            key, own = f"{_ENCODER}.{name}.{number}", f"encoder.{'down' if name == 'fpn_blocks' else 'up'}_fusions"
            statistics = inside_fusion(fusion)
            source = of_norms(network, statistics)
            for block in lacking:
                fresh |= _passing(f"{key}.bottlenecks.{block}", statistics, source)
                statistics = ActivationStatistics(mean=statistics.mean + _SHIFT, deviation=statistics.deviation)
            norm = fusion.out[1]
            passed = fusion.out[0].get_parameter("weight").detach().sum((1, 2, 3))
            moved = norm.get_buffer("running_mean") + passed * _SHIFT * len(lacking)
            source = tuple(f"{own}.{number}.out.{part}" for part in ("1.running_mean", "0.weight"))
            fresh[f"{key}.conv3.norm.running_mean"] = Derived(tensor=moved, how="shifted", source=source)
    return fresh


def _passing(key: str, statistics: ActivationStatistics, source: tuple[str, ...]) -> dict[str, Derived]:
    """One block through which everything epochs, shifted."""
    width, how = len(statistics.mean), "passing block"
    norm = _unmoved(statistics, _SHIFT)
    fresh = {f"{key}.conv2.norm.{name}": Derived(tensor=value, how=how, source=source) for name, value in norm.items()}
    fresh[f"{key}.conv2.conv.weight"] = Derived(tensor=torch.eye(width)[:, :, None, None], how=how)
    silent = {"weight": torch.zeros(width), "bias": torch.zeros(width)}
    return fresh | {f"{key}.conv1.norm.{name}": Derived(tensor=value, how=how) for name, value in silent.items()}
