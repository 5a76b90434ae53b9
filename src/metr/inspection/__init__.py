"""The label assistant: what is in several datasets, and where their labels may agree, clash or leave out.

It only suggests. Nothing is joined, renamed or left out unless a person writes so in a datasets file.
"""

from typing import Annotated

from pydantic import Field

from metr.config import Config
from metr.text.config import TextEncoderConfig

__all__ = ["InspectionConfig"]

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class InspectionConfig(Config):
    """Thresholds of the label report. Similarities are cosines of text embeddings.

    The defaults were chosen with `bundled:minilm`; other text encoders need others.
    """

    text: TextEncoderConfig = TextEncoderConfig()
    """The language model that compares names. The bundled one reads English only."""
    similar: Fraction = 0.7
    """Names of different datasets are reported as similar from this similarity on."""
    unrelated: Fraction = 0.38
    """Two datasets belong to different domains if their other names are less similar than this."""
    names: Count = 5_000
    """Most names that are compared by meaning; more would take minutes, and are compared by spelling alone."""
    images: Count = 30
    """Images of each dataset that a detector is run on."""
    threshold: Fraction = 0.3
    """Least score of a detection that counts."""
    batch_size: Count = 8
    """Images that the detector sees at once."""
    device: str = "auto"
    """Where the detector runs."""
    annotations: Count = 20_000
    """Most images of a dataset whose boxes are measured; of larger datasets, evenly spaced images."""
    files: Count = 5_000
    """Most images of a dataset that are opened, unless all are asked for."""
