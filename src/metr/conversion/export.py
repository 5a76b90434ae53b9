"""METR becomes a detector of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metr.conversion.classifier import name_tokens, refined_tokens
from metr.conversion.convert import TransferReport, giving_to_theirs, receive
from metr.conversion.image_fits import ImageFits
from metr.conversion.table import backbone_config
from metr.conversion.targets.base import BuildSpec, Colours, Context, Derived, Target
from metr.errors import ConfigError
from metr.hub import built, loading
from metr.models.backbones.base import Backbone
from metr.models.backbones.registered import register
from metr.models.detector import Detector

# of the frozen batch norms in transformers' detectors
_FROZEN_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False)
class Transferred:
    """A detector of transformers with METR's weights, and what became of each.

    `same_answers`: it answers what METR answers for the names given, and not only nearly so.
    """

    model: Any
    report: TransferReport
    same_answers: bool = False


def build(target: Target, network: Detector, names: Sequence[str], seed: int = 0) -> Any:
    """The target for METR's backbone and sizes and these names, with weights of its own initialisation.

    Raises:
        ConfigError: there is no name, or one is given twice.
        ModelError: the target cannot be built for this METR.
    """
    if not names or len(set(names)) != len(names):
        raise ConfigError("expected names, each once", where="names", hint='such as "penguin, shark"')
    register()  # the network may have METR's own backbone
    config = target.configure(build_spec_for(target, network, names))
    with loading(target.name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return built("AutoModelForObjectDetection", config).eval()


def build_spec_for(target: Target, network: Detector, names: Sequence[str]) -> BuildSpec:
    """What the target is to be built for."""
    backbone, encoder = network.backbone, network.config.encoder
    fits = target.fits(network.config)
    every = len(backbone.channels)
    levels = (
        1 if target.single_map else every if encoder.kind == "projector" or not fits else min(encoder.levels, every)
    )
    return BuildSpec(
        config=network.config,
        backbone=backbone_config(backbone, levels, target.adapted),
        channels=backbone.channels[-levels:],
        strides=backbone.strides[-levels:],
        names=tuple(names),
        fits=fits,
    )


def transfer(
    target: Target,
    network: Detector,
    names: Sequence[str],
    text: Float[Tensor, "v t"],
    seed: int = 0,
    fits: ImageFits | None = None,
) -> Transferred:
    """METR's weights in a detector of transformers.

    Args:
        target: The detector to build.
        network: METR's; on any device, and it stays as it is. What it gives is on the CPU.
        names: The detector's categories, in the order of its labels.
        text: Their text embeddings.
        seed: Seed of the weights that start afresh.
        fits: What was fitted to images, if there were any.

    Raises:
        ConfigError: there is no name, or one is given twice.
        ModelError: the target cannot be built for this METR.
    """
    model = build(target, network, names, seed)
    ours = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    table, said = target.table(model.config, network.config), [*target.differences(network.config)]
    derived = dict(variances(network.backbone, model, target.backbone))
    rows, fitting = (*table.rows(), *table.copies), target.fits(network.config)
    if fitting:
        own = _on_cpu(network)
        tokens, contents = name_tokens(own, text), refined_tokens(own, text)
        context = Context(
            network=own, text=text.cpu(), tokens=tokens, contents=contents, config=model.config, fits=fits
        )
        derived |= target.derive(context)
        said += target.told(context)
        notes = [*said, *target.in_training]
    else:
        rows, notes = table.backbone, [_only_the_backbone(target, network)]
    given = giving_to_theirs(ours, rows, derived)
    report = receive(model, given, source="METR", name=target.title, notes=notes)
    by_place = network.config.queries.layout == "places"
    return Transferred(model=model, report=report, same_answers=fitting and by_place and not said)


def variances(backbone: Backbone, model: Any, prefix: str) -> dict[str, Derived]:
    """Variances of batch norms that the detector freezes with an eps of its own, so that they scale as METR's do.

    Args:
        backbone: METR's.
        model: The detector of transformers.
        prefix: The prefix of its backbone's keys.
    """
    own, moved = dict(backbone.named_modules()), dict[str, Derived]()
    for name, module in model.named_modules():
        if not (name.startswith(prefix) and type(module).__name__.endswith("FrozenBatchNorm2d")):
            continue
        path = name.removeprefix(prefix)
        key = path if path.startswith("trunk.") else f"network.{path}"
        eps = float(getattr(own[key], "eps", _FROZEN_EPS))
        if eps != _FROZEN_EPS:
            variance = own[key].get_buffer("running_var").detach().cpu() + (eps - _FROZEN_EPS)
            source = (f"backbone.{key}.running_var",)
            moved[f"{name}.running_var"] = Derived(tensor=variance, how="eps moved into it", source=source)
    return moved


def colours_of(network: Detector) -> Colours:
    """Mean and deviation of the backbone's input normalisation, for images in 0..1."""
    backbone = network.backbone
    (r, g, b), (r_std, g_std, b_std) = (map(float, colour.flatten()) for colour in (backbone.mean, backbone.std))
    return (r, g, b), (r_std, g_std, b_std)


def _on_cpu(network: Detector) -> Detector:
    """The network itself, or a copy of it from another device."""
    if next(network.parameters()).device.type == "cpu":
        return network
    copy = Detector(_bare(network), network.text_width)
    copy.load_state_dict(network.state_dict())
    return copy.eval()


def _bare(network: Detector) -> Any:
    """Its configuration, without downloading pretrained weights."""
    backbone = network.backbone.config.model_copy(update={"pretrained": False})
    return network.config.model_copy(update={"backbone": backbone})


def _only_the_backbone(target: Target, network: Detector) -> str:
    own, decoder = network.config.encoder.kind, network.config.decoder.kind
    what = f"{target.title} has a {target.encoder} encoder and a {target.decoder} decoder, this METR has a {own} and a"
    places, kind, fits = "", network.config.queries.places, own in (target.encoder, *target.other_encoders)
    wanted = [] if fits else [f"model.encoder.kind={target.encoder}"]
    other = target.learned_decoder if kind == "learned" else ""
    wanted += [f"model.decoder.kind={other or target.decoder}"] if decoder != (other or target.decoder) else []
    if kind not in target.places:
        places = {"proposed": "", "learned": " with learned places", "learned_boxes": " with learned boxes"}[kind]
        wanted = [*wanted, "model.queries.places=proposed"]
    return f"{what} {decoder} one{places}: only the backbone moves. Train with {' and '.join(wanted)} to move more"
