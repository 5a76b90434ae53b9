"""METR: one object detector from many isolated datasets.

from metr import METR

model = METR.from_pretrained("runs/joint")
model.detect("street.jpg")
model.detect("street.jpg", ["traffic cone", "bicycle"])
"""

from typing import TYPE_CHECKING

from metr.registration import register_backbone

if TYPE_CHECKING:
    from metr.model import METR as METR

__version__ = "0.1.0"
__all__ = ["METR", "__version__"]
register_backbone()


def __getattr__(name: str) -> object:
    """`METR` is imported when it is asked for: the parts of the package can be used without the whole."""
    if name == "METR":
        from metr.model import METR

        return METR
    raise AttributeError(f"module 'metr' has no attribute {name!r}")
