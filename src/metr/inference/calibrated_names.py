"""Names for which a user gives a calibration: those that detection looks for, also in another case."""

import logging
from collections.abc import Mapping, Sequence

from metr.config import Calibration
from metr.errors import ConfigError, did_you_mean
from metr.inference.config import InferenceConfig, with_calibration
from metr.text.same_names import in_another_case, listed

__all__ = ["checked_calibrations", "with_names_in_their_case"]

_KEY = "inference.postprocess.calibration"
_logger = logging.getLogger(__name__)


def with_names_in_their_case(
    config: InferenceConfig, asked: Sequence[str], trained: Sequence[str], meant: Mapping[str, str]
) -> InferenceConfig:
    """The configuration, whose calibrations hold for names as detection takes them.

    Args:
        config: Its calibrations are for asked and trained names, perhaps in another case.
        asked: The names that are looked for.
        trained: The names of training.
        meant: The trained names that others mean.
    """
    own = _in_their_case(config.postprocess.calibration, asked, trained, meant)
    return with_calibration(config, {alias: own[name] for alias, name in meant.items() if name in own} | own)


def checked_calibrations(
    config: InferenceConfig, asked: Sequence[str], trained: Sequence[str], meant: Mapping[str, str]
) -> InferenceConfig:
    """The same of what a user gives, without what is kept with a detector; names that are not looked for are logged.

    Raises:
        ConfigError: a name is neither asked for nor trained.
    """
    given = _in_their_case(config.postprocess.calibration, asked, trained, meant)
    for name in given:
        if name not in asked and name not in trained:
            what = f"expected names that are looked for or trained, found {name!r}"
            raise ConfigError(what, where=_KEY, hint=did_you_mean(name, asked))
    wanted = {*asked, *(meant[name] for name in asked if name in meant)}
    if idle := [name for name in given if name not in wanted]:
        _logger.warning("%s: without effect, as they are not looked for: %s", _KEY, listed(idle))
    return with_names_in_their_case(config, asked, trained, meant)


def _in_their_case(
    given: Mapping[str, Calibration], asked: Sequence[str], trained: Sequence[str], meant: Mapping[str, str]
) -> dict[str, Calibration]:
    """Calibrations by asked or trained names, as far as there is one that is meant."""
    known = {*asked, *trained}
    others = in_another_case([*given], asked) | in_another_case([*given], trained) | dict(meant)
    return {name if name in known else others.get(name, name): one for name, one in given.items()}
