"""METR: one object detector from many isolated datasets.

import metr

metr.train(["bccd", "aquarium"], "runs/joint")
model = metr.METR.from_pretrained("runs/joint")
model.detect("street.jpg")
model.detect("street.jpg", ["traffic cone", "bicycle"])

Importing the package imports neither torch nor transformers: a name is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metr.completion.complete import complete
    from metr.conversion.adoption import from_detector
    from metr.conversion.transfer import transfer
    from metr.evaluation.runner import evaluate
    from metr.inspection.label_report import inspect
    from metr.model import METR
    from metr.models.backbones.registered import register
    from metr.sharing.model_card import model_card
    from metr.sharing.push import push, save
    from metr.training.finetune import finetune
    from metr.training.train import train

__version__ = "0.1.0"
__all__ = [
    "METR",
    "__version__",
    "complete",
    "evaluate",
    "finetune",
    "from_detector",
    "inspect",
    "model_card",
    "push",
    "register",
    "save",
    "train",
    "transfer",
]

_HOMES = {
    "METR": "metr.model",
    "complete": "metr.completion.complete",
    "evaluate": "metr.evaluation.runner",
    "finetune": "metr.training.finetune",
    "from_detector": "metr.conversion.adoption",
    "inspect": "metr.inspection.label_report",
    "model_card": "metr.sharing.model_card",
    "push": "metr.sharing.push",
    "register": "metr.models.backbones.registered",
    "save": "metr.sharing.push",
    "train": "metr.training.train",
    "transfer": "metr.conversion.transfer",
}


def __getattr__(name: str) -> object:
    """Imports what is asked for. What is found is kept, so that it is looked for once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'metr' has no attribute {name!r}")
    found: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The names that can be asked for, imported or not."""
    return sorted({*globals(), *__all__})
