"""LVIS: COCO JSON that says for each image which of its many categories were looked for.

A category is annotated in an image where it has boxes or is listed in `neg_category_ids` (none is there), unless it is
listed in `not_exhaustive_category_ids` (some are left unboxed). Of all others nothing is known.

LVIS's own names (those with a synset) are words: `aerosol_can` is read as `aerosol can`, `bow_(weapon)` as
`bow (weapon)`, because the text encoder reads them, and other datasets write them so. Synonyms, definitions and
frequencies are left out. Images are COCO's: named by `file_name`, or by the end of `coco_url`, which tells whether
one lies in `train2017` or `val2017`.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from metr.data.formats.base import plain_name
from metr.data.formats.coco_files import CocoCategory, CocoImage, Id
from metr.data.formats.coco_variants import CocoVariant


class LvisImage(CocoImage, gc=False):
    """An image with the categories that were looked for in vain, and those of which only some objects are boxed."""

    file_name: str = ""
    coco_url: str = ""
    neg_category_ids: list[Id] = []  # noqa: RUF012  (msgspec copies it)
    not_exhaustive_category_ids: list[Id] = []  # noqa: RUF012

    def __post_init__(self) -> None:
        """Names an image that has no file name by its address."""
        self.file_name = self.file_name or self.tail

    @property
    def tail(self) -> str:
        """Folder and name of the image in its address at COCO."""
        return "/".join(self.coco_url.split("/")[-2:])


class LvisReader(CocoVariant):
    """LVIS JSON: `lvis_v1_train.json` and `lvis_v1_val.json` with COCO's images."""

    format = "lvis"
    looks_like = "LVIS: lvis_v1_*.json, or COCO JSON with neg_category_ids, and the folders train2017 and val2017"
    image_type = LvisImage
    file_names = re.compile(r"lvis_", re.IGNORECASE)
    keys = (b'"neg_category_ids"',)
    bases = ("coco",)
    federated = True

    def image_names(self, image: CocoImage) -> Sequence[str]:
        """The file name, and the end of the address where that says something else."""
        tail = image.tail if isinstance(image, LvisImage) else ""
        return tuple(dict.fromkeys(filter(None, (image.file_name, tail))))

    def category_name(self, category: CocoCategory) -> str:
        """The name; in words where it is one of LVIS's own, which carry a synset."""
        name = category.name if category.synset is None else category.name.replace("_", " ")
        return plain_name(name) or f"category {category.id}"

    def annotated(
        self, image: CocoImage, labels: Int[np.ndarray, "m"], numbers: Mapping[Id, int]
    ) -> Sequence[int] | None:
        """The categories that have boxes and those that are not there, without those that are boxed in part."""
        if not isinstance(image, LvisImage):
            return None
        absent, partly = (
            {numbers[category] for category in ids if category in numbers}
            for ids in (image.neg_category_ids, image.not_exhaustive_category_ids)
        )
        return sorted({*labels.tolist(), *absent} - partly)
