"""Configuration of the label assistant."""

from typing import Annotated

from pydantic import Field

from metr.config import Config
from metr.text.encoder import TextEncoderConfig

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class InspectionConfig(Config):
    """What is compared, and from where on it is told. The similarities are cosines of text embeddings.

    Their defaults were found with `bundled:minilm`; other text encoders spread their similarities otherwise.
    """

    text: TextEncoderConfig = TextEncoderConfig()
    """The language model that compares names. The bundled one reads English only."""
    near: Share = 0.7
    """Similarity from which names of different datasets are told as near in meaning."""
    akin: Share = 0.59
    """Similarity from which a unannotated name may stand in a dataset under another name."""
    far: Share = 0.38
    """Similarity of the other names below which two datasets are taken to speak of different things."""
    images: Count = 30
    """Images of each dataset that a detector looks at."""
    threshold: Share = 0.3
    """Least score of a detection that counts."""
    batch_size: Count = 8
    """Images that the detector sees at once."""
    device: str = "auto"
    """Where the detector runs."""
    annotations: Count = 20_000
    """Most images of a dataset whose boxes are measured; evenly spaced ones are taken of more."""
    files: Count = 5_000
    """Most images of a dataset that are opened, unless all are asked for."""
