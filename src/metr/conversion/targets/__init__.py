"""The detectors that METR's weights move to, by name."""

from importlib import import_module

from metr.conversion.targets.base import Target
from metr.errors import ConfigError, did_you_mean

# each in a module of its name, as TARGET; imported when it is asked for
NAMES = (
    "deformable_detr",
    "dab_detr",
    "conditional_detr",
    "detr",
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "deimv2",
    "lw_detr",
    "rf_detr",
)


def find_target(name: str) -> Target:
    """The target of that name; hyphens and capitals do not count.

    Raises:
        ConfigError: there is none.
    """
    wanted = name.strip().lower().replace("-", "_")
    if wanted not in NAMES:
        raise ConfigError(f"no detector {name!r}", where="--to", hint=did_you_mean(wanted, NAMES))
    module = import_module(f"{__name__}.{wanted.removesuffix('_v2')}")
    target = module.TARGET_V2 if wanted.endswith("_v2") else module.TARGET
    assert isinstance(target, Target)
    return target
