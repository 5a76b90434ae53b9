"""Configuration of detection: batches, precision, which names get a slot, and which outputs become detections."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from metr.config import Calibration, Config, merge, parse_overrides
from metr.errors import ConfigError
from metr.idle_settings import check_effects

Precision = Literal["fp32", "bf16", "fp16"]
Labels = Literal["names", "scores", "none"]
"""What is written at drawn boxes."""
Form = Literal["crops", "csv", "coco", "yolo"]
"""crops: each object as an image, in a folder for its name; csv: a table; coco, yolo: a dataset with the images."""
Probability = Annotated[float, Field(ge=0, le=1)]


class SelectionConfig(Config):
    """Which names get a slot when detecting, and how many queries."""

    presence_threshold: Probability | None = None
    """Smallest presence probability with which a name gets a slot. None: 0 if no more names are asked for than there
    are slots; otherwise `model.categories.threshold` of training, and `untrained_threshold` for untrained names."""
    untrained_threshold: Probability = 0.02
    """`presence_threshold` of names that were not trained, where it is None and names are more than slots."""
    most_queries: Annotated[int, Field(ge=1)] | None = None
    """Largest number of queries of a name in an image: more than in training disturb each other, fewer lose crowds.
    None: what names share, up to `model.queries.ceiling`. Without effect in `model.queries.layout: places`."""
    trained_queries: bool = False
    """Whether a trained name gets at most as many queries as its datasets gave it in training. Then images with more
    objects than that lose some."""


class PostprocessConfig(Config):
    """How the network's outputs become detections."""

    max_detections: Annotated[int, Field(gt=0)] = 100
    """Maximum number of detections per image, over all categories; the default is the COCO protocol's."""
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lowest score of a detection. 0 keeps everything, as average precision needs."""
    presence_power: Annotated[float, Field(ge=0)] = 0.25
    """Exponent of the category's presence probability as a factor of the score; 0 leaves presence out."""
    calibration: dict[str, Calibration] = Field(default_factory=dict)
    """For some names, scale and shift of the logit of the score; those that a detector keeps need not be named."""
    nms_iou: Annotated[float, Field(ge=0, le=1)] | None = 0.7
    """NMS: IoU above which the weaker of two boxes of one category is dropped; None keeps both."""
    nms_across_names: bool = False
    """Whether `nms_iou` also applies across categories: overlapping boxes then keep only the best name."""


class InferenceConfig(Config):
    """How images go through the network, and what becomes of its outputs: the same in evaluation and detection."""

    batch_size: Annotated[int, Field(gt=0)] = 8
    """Maximum number of images per step; only images of one padded shape share a step."""
    precision: Precision = "fp32"
    """Arithmetic of the network (autocast); scores and boxes are finished in fp32."""
    selection: SelectionConfig = SelectionConfig()
    """Which names get a slot, and how many queries."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """Which of the outputs become detections."""


class TilesConfig(Config):
    """How an image is cut into tiles, and how their detections become those of the image."""

    width: Annotated[int, Field(ge=16, le=16_384)] = 640
    """Pixels of a tile. The shape of training images suits the network best."""
    height: Annotated[int, Field(ge=16, le=16_384)] = 640
    """Pixels of a tile."""
    overlap: Annotated[float, Field(ge=0, lt=0.9)] = 0.25
    """Least overlap of neighbours as a fraction of a tile. An object that is smaller is whole in one of them."""
    whole: bool = True
    """Whether the whole image is looked at as well, for objects that are larger than tiles."""
    nms_iou: Annotated[float, Field(ge=0, le=1)] = 0.6
    """IoU above which the weaker of two boxes of one name is dropped."""
    contained: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A box that ends where its tile is cut goes if another of its name covers more of it than this."""


def without_presence(config: InferenceConfig) -> InferenceConfig:
    """The configuration for a network whose presence was never taught: no name is scored or dropped by it."""
    return config.model_copy(
        update={
            "selection": config.selection.model_copy(update={"presence_threshold": 0.0}),
            "postprocess": config.postprocess.model_copy(update={"presence_power": 0.0}),
        }
    )


def suited(config: InferenceConfig, presence: bool, kept: Mapping[str, Calibration]) -> InferenceConfig:
    """The configuration for a network by what is kept with it: was presence taught, which names are calibrated."""
    return with_calibration(config if presence else without_presence(config), kept)


def with_calibration(config: InferenceConfig, kept: Mapping[str, Calibration]) -> InferenceConfig:
    """The configuration with these calibrations of names for which it has none of its own."""
    calibration = {**kept, **config.postprocess.calibration}
    postprocess = config.postprocess.model_copy(update={"calibration": calibration})
    return config.model_copy(update={"postprocess": postprocess})


def inference_config(
    overrides: Sequence[str] = (), *, batch_size: int | None = None, postprocess: Mapping[str, Any] | None = None
) -> InferenceConfig:
    """The configuration of an evaluation or a detection.

    Args:
        overrides: `["inference.section.key=value", ...]`; options laid over them win.
        batch_size: Images per step; None leaves it.
        postprocess: Settings of `PostprocessConfig`; those that are None are left.

    Raises:
        ConfigError: a key is unknown, a value is of the wrong kind, or an override is not of inference.
    """
    tree = parse_overrides(overrides)
    if others := sorted(tree.keys() - {"inference"}):
        hint = "all other settings are those of metr train and metr finetune"
        raise ConfigError(f"expected keys that begin with inference., found {others}", where="--set", hint=hint)
    given = {key: value for key, value in (postprocess or {}).items() if value is not None}
    options = {"postprocess": given} | ({} if batch_size is None else {"batch_size": batch_size})
    config = InferenceConfig.checked(merge(tree.get("inference") or {}, options), where="--set")
    layers, default = [tree, {"inference": options}], {"inference": InferenceConfig().model_dump(mode="json")}
    check_effects(layers, {"inference": config.model_dump(mode="json")}, anyway=[default], where="--set")
    return config
