"""Configuration of the data path: how images are chosen, resized, augmented, mixed and loaded."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from metr.config import Config

Fraction = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]
Channel = Annotated[int, Field(ge=0, le=255)]
MosaicScale = Annotated[float, Field(ge=0.5, le=2)]
MOST_PIXELS_A_SIDE = 16_384
Side = Annotated[int, Field(ge=1, le=MOST_PIXELS_A_SIDE)]
Colour = tuple[Channel, Channel, Channel]
Unannotated = Literal["ignore", "negative", "pseudo_label"]
Mixture = Literal["proportional", "sqrt", "equal"] | dict[str, Annotated[float, Field(ge=0)]]

# The mean of natural photographs: close to zero after the normalisation of any backbone.
MEAN_COLOUR: Colour = (124, 116, 104)


class ResizeConfig(Config):
    """The shape in which images enter the network."""

    mode: Literal["stretch", "fit"] = "stretch"
    """`stretch`: a square, whatever the image's shape. `fit`: the aspect is kept."""
    size: Side = 320
    """Pixels: both sides with `stretch`, the shorter side with `fit`."""
    longest: Side = 1333
    """Pixels: maximum of the longer side with `fit`."""
    filter: Literal["area", "bilinear", "bicubic"] = "area"
    """What a pixel is made of. `area`: the mean of what it covers where images shrink (OpenCV). `bilinear` and
    `bicubic`: Pillow's, with which public detectors were trained."""


class MosaicConfig(Config):
    """Training samples that are four images of one dataset (Bochkovskiy et al., 2020: YOLOv4)."""

    probability: Fraction = 0.0
    """Fraction of samples that are mosaics. Each reads four images, at random places of its dataset."""
    until: Fraction = 0.8
    """Fraction of the run's steps after which no sample is a mosaic any more."""
    scale: tuple[MosaicScale, MosaicScale] = (0.5, 1.0)
    """Size of an image in a mosaic, relative to that image alone: minimum and maximum. 0.5 shows all four whole."""

    @model_validator(mode="after")
    def _ordered(self) -> "MosaicConfig":
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale must be (least, most) with least <= most")
        return self


class AugmentationConfig(Config):
    """Random changes of training images. Evaluation only resizes."""

    resize: ResizeConfig = ResizeConfig()
    """The shape in which images enter the network, in training and in evaluation."""
    sizes: tuple[Side, ...] = ()
    """Pixels: sizes to choose from for each training batch, in place of `resize.size`. Empty: that size alone."""
    mosaic: MosaicConfig = MosaicConfig()
    """Samples that are four images. They are flipped and recoloured, neither cropped nor zoomed out."""
    flip: Fraction = 0.5
    """Fraction of images that are mirrored."""
    crop: Fraction = 0.5
    """Fraction of images that are cropped (zoom-in). A crop keeps at least one object where there is one."""
    crop_area: tuple[Fraction, Fraction] = (0.3, 1.0)
    """Area of a crop as a fraction of the image's: minimum and maximum."""
    crop_aspect: Annotated[float, Field(ge=1)] = 1.33
    """A crop's width over its height, both as fractions of the image's sides: at most this, at least its inverse."""
    min_visible: Fraction = 0.4
    """Fraction of a box's area that a crop must leave for the box to count. A box with less left of it is ignored:
    detecting it is neither required nor a mistake."""
    zoom_out: Fraction = 0.3
    """Fraction of images that are placed, smaller, on a canvas (zoom-out). Never together with a crop."""
    zoom_out_ratio: Annotated[float, Field(ge=1, le=100)] = 2.0
    """Maximum ratio of the canvas's sides to the image's."""
    fill: Colour = MEAN_COLOUR
    """The canvas's colour: RGB, 0 to 255."""
    colour: Fraction = 0.8
    """Fraction of images whose colours change."""
    brightness: Strength = 0.25
    """Largest relative change of the brightness: 0.25 means factors of 0.75 to 1.25."""
    contrast: Strength = 0.25
    """Largest relative change of the contrast."""
    saturation: Strength = 0.3
    """Largest relative change of the saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.015
    """Largest rotation of the hue, as a fraction of the circle. Small: in many fields the colour is the category."""

    @model_validator(mode="after")
    def _consistent(self) -> "AugmentationConfig":
        if self.crop + self.zoom_out > 1:
            raise ValueError("crop and zoom_out exclude each other: together they may be at most 1")
        if not 0 < self.crop_area[0] <= self.crop_area[1]:
            raise ValueError("crop_area must be (least, most) with 0 < least <= most")
        return self


class LoaderConfig(Config):
    """How training images are mixed and loaded."""

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Images per step and process."""
    workers: Annotated[int, Field(ge=0, le=1_024)] | None = None
    """Processes that read images; 0 reads in the training process. None: the spare cores, at most 8."""
    prefetch: Annotated[int, Field(ge=1, le=1_024)] = 2
    """Batches that each worker prepares in advance."""
    mixture: Mixture = "sqrt"
    """How often each dataset is sampled: `proportional` to its images, to their square root (`sqrt`), all alike
    (`equal`), or a weight for each dataset by name."""
    repeat_threshold: Fraction = 0.0
    """A category in a fraction f of a dataset's images is rare if f is below this: an epoch then repeats its images
    sqrt(this / f) times. 0: every image comes once."""
    shards_at_once: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Of datasets in shards: an epoch goes through so many shards at a time, in random order, and shuffles the images
    of these together. Less random, but what is fetched is used at once. 0: all images are shuffled together."""
    multiple: Annotated[int, Field(ge=1, le=4_096)] = 32
    """Pixels: the sides of a batch are padded to multiples of this, the coarsest stride of the network."""


class SubsetConfig(Config):
    """Which part of each dataset's training images is used."""

    shots: Annotated[int, Field(ge=1)] | None = None
    """Train on so few images that each category has this many objects, or all that it has. None: on all images."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Train on this fraction of the images. None: on all images."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which images are chosen."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "SubsetConfig":
        if self.shots is not None and self.fraction is not None:
            raise ValueError("shots and fraction exclude each other: give one of them")
        return self

    @property
    def whole(self) -> bool:
        """Whether all images are used."""
        return self.shots is None and self.fraction in {None, 1.0}
