"""The heads: a logit for "is this my category?", and a box that refines a reference box."""

import math
from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.boxes import moved
from metr.layers.mlp import MLP
from metr.models.config import SimilarityConfig
from metr.structures import Categories

# Embeddings (of length 1) that are nearer than this are of one text.
_SAME_TEXT = 1e-2
# The sum of all rivals that count is at least this fraction of the largest rival, which bounds logits near 69.
_LEAST_SHARE = 1e-30


class SimilarityHead(nn.Module):
    """One logit for each pair of feature and token: factor * MLP(feature) . token / sqrt(d) + b.

    With `objectness` a linear layer of the feature alone is added.

    Args:
        width: d.
        prior: The probability that the untrained head predicts.
        config: The factor, and whether there is objectness.
    """

    def __init__(self, width: int, prior: float, config: SimilarityConfig | None = None) -> None:
        super().__init__()
        config = config or SimilarityConfig()
        self.feature = MLP((width, width, width))
        self.bias = nn.Parameter(torch.tensor([math.log(prior / (1 - prior))]))
        self.objectness = nn.Linear(width, 1, bias=False) if config.objectness else None
        self.scale = config.factor / math.sqrt(width)
        with torch.no_grad():  # the factor leaves initial logits alone
            for parameter in self.feature.last.parameters():
                parameter.div_(config.factor)

    def forward(self, features: Float[Tensor, "*n d"], tokens: Float[Tensor, "*#n d"]) -> Float[Tensor, "*n"]:
        """One logit for each feature and its token."""
        similarity: Tensor = (self.feature(features) * tokens).sum(-1)
        logit = similarity * self.scale + self.bias
        return logit if self.objectness is None else logit + self.objectness(features).squeeze(-1)

    def all_pairs(self, features: Float[Tensor, "b p d"], tokens: Float[Tensor, "b k d"]) -> Float[Tensor, "b p k"]:
        """One logit for each feature and each token."""
        logits: Tensor = (self.feature(features) @ tokens.transpose(1, 2)) * self.scale + self.bias
        return logits if self.objectness is None else logits + self.objectness(features)


class ClassifierHead(nn.Module):
    """One logit for each pair of feature and name, by a linear classifier: feature . (P e) + p . e.

    P and p, which have biases, make weight and bias of a name's classifier from its text embedding e. Every set of
    classifiers of a detector with fixed classes has this form, up to as many classes as an embedding has numbers.

    With rivals it is the logit of a name's probability in a softmax of the name and the rivals.

    Args:
        width: d.
        text_width: Size of a text embedding, t.
        prior: The probability that the untrained head predicts.
        rivals: How many classifiers a name competes with.
    """

    def __init__(self, width: int, text_width: int, prior: float, rivals: int = 0) -> None:
        super().__init__()
        self.weight = nn.Linear(text_width, width)
        self.bias = nn.Linear(text_width, 1)
        self.rivals = Rivals(width, text_width, rivals) if rivals else None
        nn.init.zeros_(self.bias.weight)
        nn.init.constant_(self.bias.bias, math.log(prior / (1 - prior)))

    def forward(self, features: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*#n t"]) -> Float[Tensor, "*n"]:
        """One logit for each feature and its name."""
        logit: Tensor = (features * self.weight(embeddings)).sum(-1) + self.bias(embeddings).squeeze(-1)
        if self.rivals is None:
            return logit
        rivals: Tensor = self.rivals(features.unsqueeze(-2), embeddings.unsqueeze(-2))
        return logit.float() - rivals.flatten(-2).squeeze(-1)

    def all_pairs(self, features: Float[Tensor, "b p d"], embeddings: Float[Tensor, "b k t"]) -> Float[Tensor, "b p k"]:
        """One logit for each feature and each name."""
        logits: Tensor = features @ self.weight(embeddings).transpose(1, 2) + self.bias(embeddings).transpose(1, 2)
        return logits if self.rivals is None else logits.float() - self.rivals(features, embeddings)


class Rivals(nn.Module):
    """Linear classifiers that names compete with (DETR's labels and "no object").

    Those that stand for a name keep its text embedding in `text`, and do not count against that name; the others have
    zeros there.

    Args:
        width: d.
        text_width: Size of a text embedding, t.
        number: How many, n.
    """

    text: Tensor

    def __init__(self, width: int, text_width: int, number: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, number)
        # all together they are worth a logit of about 0
        nn.init.constant_(self.logits.bias, -math.log(number))
        self.register_buffer("text", torch.zeros(number, text_width))

    def forward(
        self, features: Float[Tensor, "*n p d"], embeddings: Float[Tensor, "*#n k t"]
    ) -> Float[Tensor, "*n p k"]:
        """The logarithm of the sum of the exponentials of the logits of those that count, for each feature and name."""
        logits = self.logits(features).float()
        largest = logits.detach().amax(-1, keepdim=True)
        shares = (logits - largest).exp()
        device = shares.device.type
        counts = (~self.stand_for(embeddings)).to(shares).transpose(-1, -2)
        whole = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with whole:
            total: Tensor = shares @ counts
        together: Tensor = largest + total.clamp(min=_LEAST_SHARE).log()
        return together

    @torch.no_grad()
    def stand_for(self, embeddings: Float[Tensor, "*n k t"]) -> Bool[Tensor, "*n k r"]:
        """Which rival stands for which name."""
        # by differences, as products of embeddings are too coarse on some devices
        names, rivals = embeddings.float(), self.text.float()
        if torch.compiler.is_exporting():  # ONNX has no counterpart of cdist
            apart = (names.unsqueeze(-2) - rivals).square().sum(-1).sqrt()
        else:
            apart = torch.cdist(names, rivals, compute_mode="donot_use_mm_for_euclid_dist")
        return apart < _SAME_TEXT


def build_class_head(
    width: int, text_width: int, prior: float, config: SimilarityConfig
) -> SimilarityHead | ClassifierHead:
    """The class head of the configured form."""
    if config.form == "classifier":
        return ClassifierHead(width, text_width, prior, config.rivals)
    return SimilarityHead(width, prior, config)


def similarity_tokens(categories: Categories, config: SimilarityConfig) -> Float[Tensor, "b k c"]:
    """What class heads compare features with, for each slot: a token, or the text embedding.

    Empty slots have id 0 and get an arbitrary one.
    """
    if config.form == "classifier":
        assert categories.embeddings is not None
        return categories.embeddings[categories.ids]
    return categories.text[categories.ids] if config.token == "text" else categories.kept_tokens


class BoxHead(nn.Module):
    """Refines a reference box by a change predicted from a feature. Untrained, it changes nothing.

    Args:
        width: d.
        form: `logit` adds the change to the inverse sigmoid of each coordinate; `reparametrised` moves the centre by
            multiples of the box's sides and multiplies these by exponentials.
    """

    def __init__(self, width: int, form: Literal["logit", "reparametrised"] = "logit") -> None:
        super().__init__()
        self.reparametrised = form == "reparametrised"
        self.change = MLP((width, width, width, 4))
        nn.init.zeros_(self.change.last.weight)
        nn.init.zeros_(self.change.last.bias)

    def start(self, boxes: Float[Tensor, "*n 4"], margin: float = 1e-3) -> Float[Tensor, "*n 4"]:
        """What `forward` takes as the reference for these cxcywh boxes: themselves, or their logits (`box_logits`)."""
        return boxes if self.reparametrised else box_logits(boxes, margin)

    def forward(self, features: Float[Tensor, "*n d"], reference: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
        """cxcywh boxes, float32; those of the `logit` form are in 0..1."""
        change = self.change(features).float()
        if self.reparametrised:
            return moved(reference.float(), change)
        refined: Tensor = change + reference.float()
        return refined.sigmoid()


def box_logits(boxes: Float[Tensor, "*n 4"], margin: float = 1e-3) -> Float[Tensor, "*n 4"]:
    """The inverse sigmoid of boxes; coordinates and their distances from 1 are at least `margin`."""
    return (boxes.clamp(margin, 1.0) / (1 - boxes).clamp(margin, 1.0)).log()
