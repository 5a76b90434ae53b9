"""Settings that have no effect beside others. What a user sets in vain is refused; what is read of a file is not.

A checkpoint, a recipe or a saved run may hold such values: only what is given now, and is not as it is anyway, counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metr.config import Tree, leaves
from metr.errors import ConfigError

__all__ = ["check_effects"]


@dataclass(frozen=True, kw_only=True)
class _Need:
    """Settings, all of which need that another one has certain values.

    Attributes:
        keys: The settings; a section ends in a dot.
        other: What they need.
        met: Whether a value of it will do.
        wanted: Such a value, in words.
    """

    keys: tuple[str, ...]
    other: str
    met: Callable[[Any], bool]
    wanted: str

    def concerns(self, key: str) -> bool:
        return key != self.other and any(key.startswith(one) if one.endswith(".") else key == one for one in self.keys)


def _above_0(other: str, *keys: str) -> _Need:
    return _Need(keys=keys, other=other, met=bool, wanted="above 0")


def _on(other: str, *keys: str) -> _Need:
    return _Need(keys=keys, other=other, met=bool, wanted="true")


def _one_of(other: str, values: Sequence[str], *keys: str) -> _Need:
    return _Need(keys=keys, other=other, met=lambda found: found in values, wanted=" or ".join(map(repr, values)))


def _encoder(values: Sequence[str], *names: str) -> _Need:
    return _one_of("model.encoder.kind", values, *(f"model.encoder.{name}" for name in names))


_COLOURS = tuple(f"augmentation.{name}" for name in ("brightness", "contrast", "saturation", "hue"))
_NEEDS = (
    _above_0("model.denoising.number", "model.denoising."),
    _on("model.denoising.flips", "model.denoising.flip_noise"),
    _above_0("criterion.weights.denoising", "model.denoising."),
    _above_0("model.denoising.number", "criterion.weights.denoising"),
    _above_0("model.queries.one_to_many.number", "model.queries.one_to_many.", "criterion.weights.one_to_many"),
    _above_0("criterion.weights.one_to_many", "model.queries.one_to_many."),
    _one_of("model.queries.layout", ("budget",), "model.queries.floor"),
    _encoder(("deformable",), "points"),
    _encoder(("hybrid", "lite"), "fusion", "fusion_inputs", "fusion_convolutions", "project_memory"),
    _encoder(("hybrid", "lite", "projector"), "fusion_blocks", "fusion_expansion"),
    _encoder(("projector",), "scales", "norm", "norm_eps"),
    _above_0("augmentation.mosaic.probability", "augmentation.mosaic."),
    _above_0("augmentation.crop", "augmentation.crop_area", "augmentation.crop_aspect"),
    _above_0("augmentation.zoom_out", "augmentation.zoom_out_ratio"),
    _above_0("augmentation.colour", *_COLOURS),
    _one_of("augmentation.resize.mode", ("fit",), "augmentation.resize.longest"),
    _one_of("criterion.classification", ("quality",), "criterion.quality_alpha", "criterion.quality_gamma"),
    _one_of("criterion.classification", ("matchability",), "criterion.matchability_gamma"),
    _on("train.ema.enabled", "train.ema."),
    _one_of("train.schedule.kind", ("flat_cosine",), "train.schedule.flat_fraction"),
    _one_of("train.schedule.kind", ("cosine", "flat_cosine"), "train.schedule.floor"),
    _above_0("train.loop.evaluate_every", "train.loop.patience"),
    _one_of("unannotated", ("pseudo_label",), "train.pseudo_labels."),
    _Need(
        keys=("inference.selection.untrained_threshold",),
        other="inference.selection.presence_threshold",
        met=lambda found: found is None,
        wanted="null",
    ),
    _Need(
        keys=("inference.postprocess.nms_across_names",),
        other="inference.postprocess.nms_iou",
        met=lambda found: found is not None,
        wanted="a number",
    ),
)


def check_effects(
    layers: Sequence[Mapping[str, Any]], after: Tree, *, anyway: Sequence[Tree], where: object = None
) -> None:
    """Checks that what a user sets has an effect.

    What is off (0, false, none) is never in vain, nor is what a later layer switches off.

    Args:
        layers: What the user sets; later ones win.
        after: The whole configuration with them.
        anyway: Configurations without them: values that are in one of these were not asked for.
        where: What the message is about.

    Raises:
        ConfigError: a setting has no effect; the message names it, and what it needs.
    """
    given, found, before = [leaves(layer) for layer in layers], leaves(after), [leaves(tree) for tree in anyway]
    last = {key: number for number, layer in enumerate(given) for key in layer}
    idle = [
        (key, need)
        for key in last
        if found.get(key) and all(tree.get(key) != found[key] for tree in before)
        for need in _NEEDS
        if need.concerns(key) and need.other in found and not need.met(found[need.other])
        if last.get(need.other, -1) <= last[key]
    ]
    if not idle:
        return
    told = dict(reversed([(key, need) for key, need in idle]))  # of several needs of a setting, the first
    what = "; ".join(
        f"{key}={found[key]} has no effect: it needs {need.other} {need.wanted}, found {found[need.other]}"
        for key, need in reversed(told.items())
    )
    key, need = idle[0]
    raise ConfigError(what, where=where, hint=f"set {need.other}, or leave {key} out")
