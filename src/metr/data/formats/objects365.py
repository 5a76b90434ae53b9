"""Objects365 (v2): COCO JSON with the images in numbered patches, and more flags on a box.

`isfake` marks what only looks like the object (an image of it, a doll): like a crowd it is ignored, so that finding it
is neither right nor wrong. Reflections (`isreflected`) are objects. Every image was searched for all categories.

An image is named by its path in the archives (`images/v1/patch8/objects365_v1_00420917.jpg`); of that only the end
need be there, below `train`, `val` or `images`: with patches or without.
"""

import re

from metr.data.formats.coco_files import CocoAnnotation
from metr.data.formats.coco_variants import CocoVariant


class Objects365Annotation(CocoAnnotation, gc=False):
    """A box that may be of something that only looks like the object."""

    isfake: int | bool | None = None

    @property
    def ignored(self) -> bool:
        """Whether finding the object is neither right nor wrong: a crowd, or a fake."""
        return bool(self.iscrowd or self.isfake)


class Objects365Reader(CocoVariant):
    """Objects365 JSON: `zhiyuan_objv2_train.json` and `zhiyuan_objv2_val.json` with images in patches."""

    format = "objects365"
    looks_like = "Objects365: zhiyuan_objv2_*.json, or COCO JSON with isfake, and images in patch folders"
    annotation_type = Objects365Annotation
    file_names = re.compile(r"(zhiyuan_)?(objv2|objects?365|obj365)", re.IGNORECASE)
    keys = (b'"isfake"', b"/objects365_v")
