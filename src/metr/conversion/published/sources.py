"""Which of METR's tensors go into what is computed of it, key by key, so that a report accounts for every one."""

from torch import nn

from metr.conversion.activation_statistics import ActivationStatistics, of_memory
from metr.models.detector import Detector

_TEXT = ("category_extraction.projection", "category_extraction.norm")
# a memory of one token leaves queries and keys of the attention to it without a say
_REFINING = ("among", "among_norm", "attention.value", "attention.out", "norm", "feed_forward")


def inside(network: nn.Module, *parts: str) -> tuple[str, ...]:
    """The keys of a network's state that are these, or inside modules of these names; what it lacks has none."""
    modules = tuple(f"{part}." for part in parts)
    return tuple(key for key in network.state_dict() if key in parts or key.startswith(modules))


def of_norms(network: nn.Module, *activation_statistics: ActivationStatistics) -> tuple[str, ...]:
    """The scales and shifts that features' activation_statistics were read from."""
    names = {norm: name for name, norm in network.named_modules()}
    norms = dict.fromkeys(norm for known in activation_statistics for norm in known.norms)
    return tuple(f"{names[norm]}.{part}" for norm in norms for part in ("weight", "bias"))


def of_tokens(network: Detector) -> tuple[str, ...]:
    """What makes the tokens that queries are compared with (`classifier.name_tokens`)."""
    return of_contents(network) if network.config.similarity.token == "refined" else inside(network, *_TEXT)


def of_contents(network: Detector) -> tuple[str, ...]:
    """What makes the tokens that queries contain (`classifier.refined_tokens`)."""
    blocks = range(len(network.category_extraction.blocks))
    refining = (f"category_extraction.blocks.{block}.{part}" for block in blocks for part in _REFINING)
    return inside(network, *_TEXT, *refining) + of_norms(network, *of_memory(network.encoder))


def of_head(network: Detector) -> tuple[str, ...]:
    """What makes a classification head for the decoder's normalised output (`classifier.classifier`)."""
    return inside(network, "decoder.similarity", "decoder.norm") + of_tokens(network)


def of_layer_head(network: Detector, layer: int) -> tuple[str, ...]:
    """What makes a classification head for what a decoder layer gives (`classifier.layer_classifier`)."""
    return inside(network, f"decoder.layers.{layer}.feed_forward.norm") + of_head(network)


def of_places(network: Detector) -> tuple[str, ...]:
    """What makes a head that scores places (`classifier.place_classifier`)."""
    return inside(network, *(f"proposals.{part}" for part in ("category", "bias", "objectness"))) + of_tokens(network)
