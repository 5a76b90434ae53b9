"""The network: images and category texts in, one answer a query out."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.models.backbones import build_backbone
from metr.models.category_extraction import CategoryExtraction
from metr.models.category_selection import select_categories
from metr.models.class_queries import ClassQueries, side_by_side
from metr.models.conditional_decoder import ConditionalDecoder
from metr.models.config import DetectorConfig
from metr.models.decoder import Decoder
from metr.models.denoising import Denoising
from metr.models.encoders import build_encoder
from metr.models.proposals import ProposalHead
from metr.models.text_projection import ProjectedText
from metr.structures import Categories, DenoisingOutput, DetectorOutput, Memory, Queries, Targets

# the share of queries that hold an object, where training starts (focal loss's prior, Lin et al., 2017)
_OBJECT_PRIOR = 0.01


class Detector(nn.Module):
    """METR's network (arXiv 2304.03580).

    Args:
        config: Widths, layers and layouts of every part.
        text_width: Numbers of a text embedding, t.
    """

    def __init__(self, config: DetectorConfig, text_width: int) -> None:
        super().__init__()
        self.config, self.text_width = config, text_width
        width = config.width
        self.backbone = build_backbone(config.backbone)
        self.encoder = build_encoder(self.backbone.channels, width, config.encoder)
        self.category_extraction = CategoryExtraction(text_width, width, config.categories)
        self.proposals = ProposalHead(width, config.queries, _OBJECT_PRIOR, config.similarity)
        self.class_queries = ClassQueries(width, config.queries)
        self.denoising = Denoising(width, config.denoising) if config.denoising.number else None
        self.decoder = _build_decoder(config, self.encoder.levels)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        padding_mask: Bool[Tensor, "b h w"],
        text: Float[Tensor, "v t"] | ProjectedText,
        targets: Sequence[Targets] | None = None,
    ) -> DetectorOutput:
        """Detects the categories whose text embeddings are given.

        Args:
            images: RGB in 0..1, padded at the right and bottom to one shape.
            padding_mask: True on padding.
            text: One L2-normalised embedding a category, or what `project` made of them; labels are its rows.
            targets: In training only: present categories are sure of a slot, and objects are shown for denoising.
        """
        return self.detect(self.encode(images, padding_mask), text, targets)

    def encode(self, images: Float[Tensor, "b 3 h w"], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """The images' part of the work, done once for several vocabularies: backbone and encoder."""
        memory: Memory = self.encoder(self.backbone(images), padding_mask)
        return memory

    def detect(
        self,
        memory: Memory,
        text: Float[Tensor, "v t"] | ProjectedText,
        targets: Sequence[Targets] | None = None,
    ) -> DetectorOutput:
        """The network after its encoder: answers for one vocabulary; the arguments are those of `forward`."""
        categories = self.category_extraction(memory, text, targets)
        categories = select_categories(categories, self.config.categories, targets)
        proposals, places = self.proposals(memory, categories)
        queries = self.class_queries(proposals, places, categories)
        logits, boxes, denoising = self._decode(queries, memory, categories, targets)
        return DetectorOutput(
            logits=logits,
            boxes=boxes,
            slot=queries.slot,
            valid=queries.valid,
            categories=categories,
            proposals=proposals,
            denoising=denoising,
        )

    def project(self, text: Float[Tensor, "v t"], earlier: ProjectedText | None = None) -> ProjectedText:
        """The text's share of the work, done once for many images; outside of training, as it carries no gradient.

        Args:
            text: The embeddings, not to be changed in place.
            earlier: What a call before gave; it is given back if text, weights and precision are what they were.
        """
        return self.category_extraction.project(text, earlier)

    def _decode(
        self, queries: Queries, memory: Memory, categories: Categories, targets: Sequence[Targets] | None
    ) -> tuple[Tensor, Tensor, DenoisingOutput | None]:
        """The decoder's answers; denoising queries ride along, in groups of their own."""
        if targets is None or self.denoising is None:
            return *self.decoder(queries, memory, categories), None
        noised, plan = self.denoising(targets, categories)
        number = queries.slot.shape[1]
        logits, boxes = self.decoder(side_by_side(queries, noised), memory, categories)
        denoised = DenoisingOutput(logits=logits[..., number:], boxes=boxes[:, :, number:], plan=plan)
        return logits[..., :number], boxes[:, :, :number], denoised


def _build_decoder(config: DetectorConfig, levels: int) -> Decoder | ConditionalDecoder:
    if config.decoder.kind == "conditional":
        return ConditionalDecoder(config.width, config.decoder, _OBJECT_PRIOR, config.similarity)
    return Decoder(config.width, levels, config.decoder, _OBJECT_PRIOR, config.similarity)
