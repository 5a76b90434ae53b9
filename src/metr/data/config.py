"""Configuration of the data path: how images are resized, augmented, mixed and loaded."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from metr.config import Config

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]
Colour = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]
BaseMixture = Literal["proportional", "sqrt", "equal"] | dict[str, Annotated[float, Field(ge=0)]]
Mixture = BaseMixture | Literal["hardness"]

# The mean of natural photographs: close to zero after the normalisation of any backbone.
MEAN_COLOUR: Colour = (124, 116, 104)


class ResizeConfig(Config):
    """The shape in which images enter the network."""

    # "stretch": a square, whatever the image's shape. "fit": the aspect is kept.
    mode: Literal["stretch", "fit"] = "stretch"
    # Pixels: both sides when stretching, the shorter side when fitting.
    size: PositiveInt = 320
    # Pixels: the longer side when fitting never epochs this.
    longest: PositiveInt = 1333


class AugmentationConfig(Config):
    """Random changes of training images. Evaluation only resizes."""

    resize: ResizeConfig = ResizeConfig()
    # Pixels: sizes that training draws from, one a batch, in place of `resize.size`. Empty: that size alone.
    sizes: tuple[PositiveInt, ...] = ()
    # Share of images that are mirrored.
    flip: Probability = 0.5
    # Share of images that are cropped (zoom-in). At least one object is kept where there is one.
    crop: Probability = 0.5
    # Share of the image's area that a crop has: least and most.
    crop_area: tuple[Probability, Probability] = (0.3, 1.0)
    # A crop's width over its height, both as shares of the image's sides: at most this, at least its inverse.
    crop_aspect: Annotated[float, Field(ge=1)] = 1.33
    # Share of a box's area that must be left by a crop; below it the box is neither demanded nor punished.
    min_visible: Probability = 0.4
    # Share of images that are placed, smaller, on a canvas (zoom-out). Never together with a crop.
    zoom_out: Probability = 0.3
    # The canvas's sides over the image's, at most.
    zoom_out_ratio: Annotated[float, Field(ge=1)] = 2.0
    # The canvas's colour: RGB, 0 to 255.
    fill: Colour = MEAN_COLOUR
    # Share of images whose colours change.
    colour: Probability = 0.8
    # Largest relative change of brightness, contrast and saturation: 0.25 means factors of 0.75 to 1.25.
    brightness: Strength = 0.25
    contrast: Strength = 0.25
    saturation: Strength = 0.3
    # Largest rotation of the hue, as a share of the full circle. Small: in many fields the colour is the category.
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.015

    @model_validator(mode="after")
    def _consistent(self) -> "AugmentationConfig":
        if self.crop + self.zoom_out > 1:
            raise ValueError("crop and zoom_out exclude each other: their shares may not pass 1 together")
        if not 0 < self.crop_area[0] <= self.crop_area[1]:
            raise ValueError("crop_area must be (least, most) with 0 < least <= most")
        return self


class HardnessConfig(Config):
    """How `mixture: hardness` follows the losses: a share is that of `base` times the dataset's relative box loss."""

    # The shares if all datasets were equally hard, and as long as nothing is known.
    base: BaseMixture = "sqrt"
    # Steps between changes. A change takes effect as many steps after the last loss that it rests on.
    every: PositiveInt = 200
    # Of the relative loss: 0 keeps the shares of `base`, 1 makes them proportional to it.
    power: Annotated[float, Field(ge=0)] = 1.0
    # Of a dataset's share in `base`, the part that it keeps however easy it is.
    floor: Probability = 0.0


class LoaderConfig(Config):
    """How training images are mixed and loaded."""

    # Images a step and process.
    batch_size: PositiveInt = 8
    # Processes that read images; 0 reads in the training process. None: the spare cores, at most 8.
    workers: Annotated[int, Field(ge=0)] | None = None
    # Batches that each worker prepares in advance.
    prefetch: PositiveInt = 2
    # How often each dataset is drawn: by its images, by their square root, all alike, shares by name, or by how hard
    # it is.
    mixture: Mixture = "sqrt"
    # What "hardness" means.
    hardness: HardnessConfig = HardnessConfig()
    # A category that fewer than this share of a dataset's images show is rare: its images come more often in a pass
    # over the dataset, by the root of how much rarer it is. 0: every image comes once.
    repeat_threshold: Probability = 0.0
    # Pixels: the sides of a batch are padded to multiples of this, the coarsest stride of the network.
    multiple: PositiveInt = 32

    @property
    def base_mixture(self) -> BaseMixture:
        """The mixture as long as no loss is known."""
        return self.hardness.base if self.mixture == "hardness" else self.mixture

    def with_base_mixture(self, base: BaseMixture) -> "LoaderConfig":
        """The same with another `base_mixture`."""
        if self.mixture == "hardness":
            return self.model_copy(update={"hardness": self.hardness.model_copy(update={"base": base})})
        return self.model_copy(update={"mixture": base})
