"""Configuration of inference."""

from typing import Annotated, Literal

from pydantic import Field

from metr.config import Config

Precision = Literal["fp32", "bf16", "fp16"]


class PostprocessConfig(Config):
    """How the network's answers become detections."""

    max_detections: Annotated[int, Field(gt=0)] = 100
    """Most detections an image, over all categories together; the COCO protocol's number."""
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least score of a detection. 0 keeps everything, as average precision wants it."""
    presence_power: Annotated[float, Field(ge=0)] = 0.0
    """Exponent of the category's presence probability as a factor of the score; 0 leaves presence out."""
    nms_iou: Annotated[float, Field(ge=0, le=1)] | None = None
    """Intersection over union above which the weaker of two boxes of one category goes; None keeps both."""
    nms_across_names: bool = False
    """Whether `nms_iou` is for boxes of different categories too: then a place keeps its best name only."""

    @staticmethod
    def to_show(threshold: float) -> "PostprocessConfig":
        """What people want to see, other than what a metric wants: sure detections, and one name a place.

        Raises:
            ConfigError: the threshold is not within 0..1.
        """
        values = {"score_threshold": threshold, "nms_iou": 0.7, "nms_across_names": True}
        return PostprocessConfig.checked(values, where="threshold")


class InferenceConfig(Config):
    """How images go through the network."""

    batch_size: Annotated[int, Field(gt=0)] = 8
    """Most images of one step; only images of one shape share a step."""
    precision: Precision = "fp32"
    """Arithmetic of the network (autocast); scores and boxes are finished in fp32."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """Which of the answers become detections."""
