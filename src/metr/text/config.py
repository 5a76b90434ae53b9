"""Configuration of the text encoder."""

from typing import Literal

from pydantic import field_validator

from metr.config import Config

BUNDLED = "bundled:minilm"
Pooling = Literal["auto", "projection", "mean", "cls"]
MULTILINGUAL = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
"""A hub encoder of about 50 languages, small enough for a laptop, as trained as the bundled one."""
# General on purpose: names come from photographs, microscopy, drawings and scanned pages alike.
TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a close-up image of a {}",
    "a {} among other things",
    "a scan or drawing of a {}",
)


class TextEncoderConfig(Config):
    """Which language model, and the sentences in which it reads a name."""

    source: str = BUNDLED
    """`bundled:minilm`, a folder as save_pretrained writes it, or a hub name such as openai/clip-vit-base-patch32."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    pooling: Pooling = "auto"
    """How token vectors become the vector of a sentence: "auto" takes what the model was trained with."""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences with `{}` for the name; an embedding is the mean over them."""

    @field_validator("templates")
    @classmethod
    def _one_place_each(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ValueError("expected one or more sentences that hold {} once")
        return templates
