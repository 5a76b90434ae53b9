"""Configuration of detection: batches, precision, and which outputs become detections."""

from typing import Annotated, Literal

from pydantic import Field

from metr.config import Config

Precision = Literal["fp32", "bf16", "fp16"]


class PostprocessConfig(Config):
    """How the network's outputs become detections."""

    max_detections: Annotated[int, Field(gt=0)] = 100
    """Maximum number of detections per image, over all categories; the default is the COCO protocol's."""
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lowest score of a detection. 0 keeps everything, as average precision needs."""
    presence_power: Annotated[float, Field(ge=0)] = 0.0
    """Exponent of the category's presence probability as a factor of the score; 0 leaves presence out."""
    nms_iou: Annotated[float, Field(ge=0, le=1)] | None = None
    """NMS: IoU above which the weaker of two boxes of one category is dropped; None keeps both."""
    nms_across_names: bool = False
    """Whether `nms_iou` also applies across categories: overlapping boxes then keep only the best name."""

    @staticmethod
    def to_show(threshold: float) -> "PostprocessConfig":
        """For showing to people rather than for metrics: confident detections only, one name per place.

        Raises:
            ConfigError: the threshold is not within 0..1.
        """
        values = {"score_threshold": threshold, "nms_iou": 0.7, "nms_across_names": True}
        return PostprocessConfig.checked(values, where="threshold")


class InferenceConfig(Config):
    """How images go through the network."""

    batch_size: Annotated[int, Field(gt=0)] = 8
    """Maximum number of images per step; only images of one padded shape share a step."""
    precision: Precision = "fp32"
    """Arithmetic of the network (autocast); scores and boxes are finished in fp32."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """Which of the outputs become detections."""
