"""The category extraction module (CEM): which categories may this image contain?"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.mlp import FeedForward
from metr.models.config import CategoryConfig
from metr.models.heads import AgreementHead
from metr.structures import Categories, Memory


class ExtractionBlock(nn.Module):
    """Category tokens look at the image; where the option is on, they look at each other first."""

    def __init__(self, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads) if config.self_attention else None
        self.among_norm = nn.LayerNorm(width) if config.self_attention else None
        self.attention = Attention(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Tokens [b v d], refined once."""
        if self.among is not None and self.among_norm is not None:
            tokens = self.among_norm(tokens + self.among(tokens, tokens, tokens))
        allowed = ~memory.padding_mask.unsqueeze(1)
        seen = self.attention(tokens, memory.tokens, memory.tokens, allowed)
        refined: Tensor = self.feed_forward(self.norm(tokens + seen))
        return refined


class CategoryExtraction(nn.Module):
    """Projected text embeddings become category tokens, refined by the image block after block."""

    def __init__(self, text_width: int, width: int, config: CategoryConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(text_width, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ExtractionBlock(width, config) for _ in range(config.blocks))
        self.presence = AgreementHead(width, config.prior)

    def forward(self, memory: Memory, text: Float[Tensor, "v t"]) -> Categories:
        """Presence logits after every block, and refined tokens; every category is still kept."""
        batch, words = memory.tokens.shape[0], text.shape[0]
        projected = self.norm(self.projection(text))
        tokens = projected.expand(batch, -1, -1)
        logits = []
        for block in self.blocks:
            tokens = block(tokens, memory)
            logits.append(self.presence(tokens, projected))
        ids = torch.arange(words, device=text.device).expand(batch, -1)
        return Categories(
            presence_logits=torch.stack(logits),
            text=projected,
            tokens=tokens,
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
        )
