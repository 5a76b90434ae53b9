"""How queries start from the features of places, and the heads of these features, in RT-DETR and its successors."""

import torch

from metr.conversion.activation_statistics import inside, of_contents, of_places
from metr.conversion.classifier import Linear, place_classifier
from metr.conversion.image_fits import ImageFits, normed_start
from metr.conversion.targets.base import FOLDED_PLACES, Context, Derived, given_layer
from metr.models.detector import Detector

_NORM, _FIRST_BOXES = "model.enc_output.1", "model.enc_bbox_head.layers.0"


def places_and_names(context: Context) -> dict[str, Derived]:
    """The head that scores places, and the content of denoising queries."""
    network, contents = context.network, context.contents
    places = place_classifier(network, context.text, context.tokens)
    if context.fits is None:
        fresh = given_layer("model.enc_score_head", places, FOLDED_PLACES, of_places(network))
    else:
        fresh = _fitted_starts(network, places, context.fits)
    if context.config.num_denoising:
        learned = torch.zeros_like(contents[0]) if network.denoising is None else network.denoising.learned.detach()
        content = torch.cat([contents + learned, torch.zeros_like(contents[:1])])
        source = inside(network, "denoising.learned") + of_contents(network)
        fresh["model.denoising_class_embed.weight"] = Derived(tensor=content, how="computed: names", source=source)
    return fresh


def _fitted_starts(network: Detector, places: Linear, fits: ImageFits) -> dict[str, Derived]:
    """What queries contain, and in front of the heads of places the way back to METR's features."""
    start, how = normed_start(network, fits), str(fits)
    box = Linear.of(network.proposals.box.change[0])  # type: ignore[arg-type]
    contents = inside(network, "proposals.feature", "proposals.norm", "class_queries")
    return {
        **given_layer("model.enc_output.0", start.layer, how, contents),
        f"{_NORM}.weight": Derived(tensor=start.scale, how=how, source=contents),
        f"{_NORM}.bias": Derived(tensor=start.shift, how=how, source=contents),
        **given_layer("model.enc_score_head", places.after(start.back), how, of_places(network)),
        **given_layer(_FIRST_BOXES, box.after(start.back), how, inside(network, "proposals.box.change.0")),
    }
