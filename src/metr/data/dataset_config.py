"""How a user describes a dataset: where it is, and how it is read."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from metr.config import Config
from metr.data.formats.box_kinds import BoxKind
from metr.data.formats.registry import READERS
from metr.data.shards.addresses import path_or_address
from metr.errors import did_you_mean

SplitName = Literal["train", "val", "test"]


def _known_format(name: str) -> str:
    formats = [reader.format for reader in READERS]
    if name not in formats:
        raise ValueError(f"expected one of {', '.join(formats)}; {did_you_mean(name, formats)}".removesuffix("; "))
    return name


Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class DatasetConfig(Config):
    """One dataset of a run: where it is and how it is read. Category names are meant after `renames`."""

    name: Annotated[str, Field(min_length=1)]
    """The dataset's name in messages, results and vocabularies."""
    path: Annotated[Path | str, AfterValidator(path_or_address)]
    """Its folder, its one annotation file, an archive of the folder (zip, tar, tar.gz, tar.bz2, tar.xz), a dataset
    on the Hugging Face hub, such as `hf:user/name`, or shards: a URL or a path with braces or a glob, such as
    `s3://bucket/train-{000..127}.tar`."""
    format: Annotated[str, AfterValidator(_known_format)] | None = None
    """The format of its files. None: it is recognised."""
    splits: dict[SplitName, tuple[str, ...] | str] | None = None
    """Which of the dataset's own splits are train, val and test. None: by the convention of the format."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Sampling weight of the dataset, relative to the others."""
    prompts: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """Category name -> the phrase that the text encoder reads instead of it."""
    synonyms: dict[str, tuple[Word, ...]] = Field(default_factory=dict)
    """Category name -> other words for it, by which training calls it now and then (`train.names`), and users may."""
    absent: tuple[Word, ...] = ()
    """Words for what none of its images shows: training asks for some of them, and learns that the answer is no."""
    renames: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """Category name in the files -> category name here. Several may become one."""
    boxes: BoxKind | None = None
    """How coco, csv, imagefolder and huggingface write boxes; with n as fractions of the image, with % as per cent.
    None: recognised."""
    exhaustive: tuple[str, ...] | None = None
    """The categories annotated exhaustively, in every image. None: as the format says, mostly all."""
    only: tuple[str, ...] | None = None
    """The categories that are read; of the others nothing is known in this dataset. None: all."""
    drop: tuple[str, ...] = ()
    """Categories that are not read: nothing is known of them in this dataset, so they are no negatives either."""
    ignore: tuple[str, ...] = ()
    """Categories whose boxes are neither objects nor mistakes, whatever is found there."""

    @model_validator(mode="after")
    def _check_names(self) -> "DatasetConfig":
        if self.only is not None and self.drop:
            raise ValueError("expected `only` or `drop`, found both: `only` drops all other names")
        if twice := sorted({*(self.only or ()), *self.drop} & set(self.ignore)):
            key = "drop" if self.drop else "only"
            raise ValueError(f"{twice[0]!r} is in `{key}` and in `ignore`: write it in one of them")
        return self

    def reads(self, name: str) -> bool:
        """Whether a name (after `renames`) is a category here, as `only`, `drop` and `ignore` say."""
        return name not in self.drop and name not in self.ignore and (self.only is None or name in self.only)
