"""The network: images and text embeddings of categories in, one logit and one box a query out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metr.errors import ModelError
from metr.layers.deformable_attention import kernel_is_used
from metr.models.backbones import build_backbone
from metr.models.category_extraction import CategoryExtraction, ProjectedText
from metr.models.category_selection import drawn_sizes, select_categories
from metr.models.config import DetectorConfig
from metr.models.decoder import ConditionalDecoder, Decoder
from metr.models.denoising import Denoising
from metr.models.distribution_decoder import DistributionDecoder
from metr.models.encoders import build_encoder
from metr.models.heads import similarity_tokens
from metr.models.learned_places import build_learned_places, every_pair
from metr.models.plain_decoder import PlainDecoder
from metr.models.proposals import ClassQueries, ProposalHead, apart, side_by_side
from metr.structures import (
    Categories,
    Decoded,
    DenoisingOutput,
    DenoisingPlan,
    DetectorOutput,
    Memory,
    NameLimits,
    OneToManyOutput,
    Proposals,
    Queries,
    Targets,
)

# The probability of an object that the untrained network predicts (the prior of the focal loss, Lin et al., 2017).
_OBJECT_PRIOR = 0.01
MOST_PARAMETERS = 2_000_000_000
"""The largest network that is built: the largest detectors that are published have about half as many parameters."""


class Detector(nn.Module):
    """METR's network (arXiv 2304.03580).

    Args:
        config: Widths, layers and layouts of every part.
        text_width: Size of a text embedding, t.
    """

    def __init__(self, config: DetectorConfig, text_width: int) -> None:
        super().__init__()
        self.config, self.text_width = config, text_width
        width = config.width
        self.backbone = build_backbone(config.backbone)
        self.encoder = build_encoder(self.backbone.channels, width, config.encoder)
        self.category_extraction = CategoryExtraction(text_width, width, config.categories)
        self.learned_places = build_learned_places(width, config.queries)
        if self.learned_places is None:
            self.proposals = ProposalHead(
                width, config.queries, _OBJECT_PRIOR, text_width, config.similarity, config.decoder.boxes
            )
            self.class_queries = ClassQueries(width, config.queries)
        self.denoising = Denoising(width, config.denoising) if config.denoising.number else None
        self.decoder = _build_decoder(config, self.encoder.levels, text_width)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        padding_mask: Bool[Tensor, "b h w"],
        text: Float[Tensor, "v t"] | ProjectedText,
        targets: Targets | None = None,
        limits: NameLimits | None = None,
    ) -> DetectorOutput:
        """Detects the categories whose text embeddings are given.

        Args:
            images: RGB in 0..1, padded at the right and bottom to one shape.
            padding_mask: True on padding.
            text: One L2-normalised embedding a category, or what `project` made of them; labels are its rows.
            targets: In training only: present categories get slots first; denoising uses the objects; and there are the
                queries of `queries.one_to_many`.
            limits: In detection only: which presence gives each name a slot, and how many queries it gets at most.
                By default `categories.threshold`, and as many as the layout gives.
        """
        return self.detect(self.encode(images, padding_mask), text, targets, limits)

    def encode(self, images: Float[Tensor, "b 3 h w"], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone and encoder: the part of the network that uses no vocabulary."""
        memory: Memory = self.encoder(self.backbone(images), padding_mask)
        return memory

    def detect(
        self,
        memory: Memory,
        text: Float[Tensor, "v t"] | ProjectedText,
        targets: Targets | None = None,
        limits: NameLimits | None = None,
    ) -> DetectorOutput:
        """Runs the network after its encoder for one vocabulary. Arguments are those of `forward`."""
        categories = self.category_extraction(memory, text, targets)
        sizes = drawn_sizes(targets, self.config)
        categories = select_categories(categories, self.config, targets, limits, sizes)
        if self.learned_places is not None:
            proposals, queries = None, self.learned_places(categories)
            slot, valid = every_pair(categories, queries.slot.shape[1])
        else:
            proposals, places = self.proposals(memory, categories, most_queries(categories, limits, sizes))
            queries, slot, valid = self.class_queries(proposals, places, categories), proposals.slot, proposals.valid
        tokens = similarity_tokens(categories, self.config.similarity)
        further = self._further(memory, categories, proposals) if targets is not None else None
        noised = self.denoising(targets, categories) if targets is not None and self.denoising is not None else None
        extra = (None if further is None else further.queries, None if noised is None else noised[0])
        found = self._decoded(memory, queries, *extra)
        logits, boxes = self._answers(next(found), tokens, queries.slot)
        return DetectorOutput(
            logits=logits,
            boxes=boxes,
            slot=slot,
            valid=valid,
            categories=categories,
            proposals=proposals,
            one_to_many=None if further is None else self._one_to_many(next(found), tokens, further),
            denoising=None if noised is None else self._denoised(next(found), tokens, noised[1]),
        )

    def project(self, text: Float[Tensor, "v t"], earlier: ProjectedText | None = None) -> ProjectedText:
        """Projects the text once for many images. The result carries no gradient.

        Args:
            text: The embeddings, not to be changed in place.
            earlier: The result of an earlier call; it is returned if text, weights and precision are still the same.
        """
        return self.category_extraction.project(text, earlier)

    def _further(self, memory: Memory, categories: Categories, taken: Proposals | None) -> "_Further | None":
        """In training, queries of which several are taught one object, if there are to be any."""
        if taken is None or not self.config.queries.one_to_many.number:
            return None
        proposals, places = self.proposals.next_best(memory, categories, taken)
        queries = apart(self.class_queries(proposals, places, categories))
        return _Further(queries=queries, slot=proposals.slot, valid=proposals.valid)

    def _decoded(self, memory: Memory, *parts: Queries | None) -> Iterator[Decoded]:
        """What the decoder found for each of the sets of queries, of which none sees anything of the others."""
        asked = [part for part in parts if part is not None]
        if len(asked) == 1:
            return iter([self.decoder(asked[0], memory)])
        together: Decoded = self.decoder(side_by_side(*asked), memory)
        return together.split([part.slot.shape[1] for part in asked])

    def _one_to_many(self, decoded: Decoded, tokens: Tensor, further: "_Further") -> OneToManyOutput:
        logits, boxes = self._answers(decoded, tokens, further.slot)
        repeats = self.config.queries.one_to_many.repeats
        return OneToManyOutput(logits=logits, boxes=boxes, slot=further.slot, valid=further.valid, repeats=repeats)

    def _denoised(self, decoded: Decoded, tokens: Tensor, plan: DenoisingPlan) -> DenoisingOutput:
        return DenoisingOutput(logits=self.decoder.ask(decoded, tokens, plan.slot), boxes=decoded.boxes, plan=plan)

    def _answers(self, decoded: Decoded, tokens: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes: of each query for its own category, or of each place for every category."""
        if self.config.queries.layout == "places":
            return self.decoder.ask_everywhere(decoded, tokens)
        return self.decoder.ask(decoded, tokens, slot), decoded.boxes


def most_queries(
    categories: Categories, limits: NameLimits | None, sizes: Int[Tensor, "b"] | None = None
) -> Int[Tensor, "b k"] | None:
    """The largest number of queries of each slot: what training draws, or what limits the names when detecting."""
    if sizes is not None:
        return sizes.unsqueeze(1).expand_as(categories.ids)
    return None if limits is None else limits.queries[categories.ids]


@dataclass(frozen=True, kw_only=True)
class _Further:
    """Queries beside the proposals' own; slot and validity are those of their answers (in `places`, of all pairs)."""

    queries: Queries
    slot: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]


def compile_parts(network: Detector, backend: str = "inductor") -> None:
    """Compiles backbone, encoder and decoder in place, each into one graph; what is between them stays as it is.

    Sizes of images become variables of the graphs at the second size that is seen. Copies of the network that were
    made before are not compiled.

    Args:
        network: The network, already on its device.
        backend: Of torch.compile.
    """
    # here and not where the function stands, since it imports the compiler, which takes more than a second
    torch.compiler.assume_constant_result(kernel_is_used)  # type: ignore[no-untyped-call]
    for part in (network.backbone, network.encoder, network.decoder):
        part.compile(fullgraph=True, backend=backend)


def lay_out_for_gpu(network: Detector) -> None:
    """Stores the backbone's kernels in the layout of its maps, which spares GPUs a conversion in every step."""
    network.backbone.to(memory_format=network.backbone.memory_format)  # type: ignore[call-overload]


def skeleton(config: DetectorConfig, text_width: int) -> Detector:
    """The network without values, on the meta device: its shapes, at no cost of memory.

    Raises:
        ModelError: as `Detector`, or it has more than `MOST_PARAMETERS`.
    """
    with torch.device("meta"):
        network = unfilled(config, text_width)
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > MOST_PARAMETERS:
        what = f"the configuration describes a network of {count:,} parameters; METR builds at most {MOST_PARAMETERS:,}"
        raise ModelError(what, where="model", hint="smaller widths, or fewer layers")
    return network


def unfilled(config: DetectorConfig, text_width: int) -> Detector:
    """The network for weights that are loaded next: until then its own are whatever the memory held.

    Random weights would take longer than all else, the backbone's pretrained ones would be fetched for nothing.

    Raises:
        ModelError: as `Detector`.
    """
    bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"pretrained": False})})
    with _Unfilled():
        return Detector(bare, text_width)


class _Unfilled(TorchFunctionMode):
    """Leaves out the initial values of parameters.

    On the meta device they would be no values, but import torch's compiler, which takes longer than torch itself.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls a function of torch, or gives the parameter back that it would fill."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, nn.Parameter) and getattr(function, "__name__", None) in _FILLING:
            return filled
        return function(*args, **kwargs)


# by name, as transformers calls copies of those of nn.init; what these call in turn does not come to a mode
_FILLING = frozenset(
    {"normal_", "uniform_", "fill_", "zero_", "copy_", "div_", "trunc_normal_"}
    | {f"{scheme}_{distribution}_" for scheme in ("kaiming", "xavier") for distribution in ("normal", "uniform")}
)


def _build_decoder(config: DetectorConfig, levels: int, text_width: int) -> Decoder | ConditionalDecoder | PlainDecoder:
    if config.decoder.kind in ("conditional", "plain"):
        whole = ConditionalDecoder if config.decoder.kind == "conditional" else PlainDecoder
        return whole(config.width, config.decoder, _OBJECT_PRIOR, text_width, config.similarity)
    kind = DistributionDecoder if config.decoder.kind == "distribution" else Decoder
    return kind(config.width, levels, config.decoder, _OBJECT_PRIOR, text_width, config.similarity)
