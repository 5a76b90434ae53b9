"""Which images a transferred detector is fitted to, and the fit itself."""

import logging
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from metr.conversion.image_fits import ImageFits, Images, can_fit, fit_to_images
from metr.conversion.targets import NAMES, find_target
from metr.conversion.targets.base import Target
from metr.data.images import ImageSource, load_image, read_image
from metr.data.joint import open_joint
from metr.data.records import TRAIN, ImageRecord
from metr.errors import ConfigError, DataError
from metr.inference.image_paths import expanded_paths
from metr.inference.predictor import Predictor
from metr.model import METR
from metr.models.detector import Detector
from metr.text.vocabulary import Vocabulary

_logger = logging.getLogger(__name__)

MOST_IMAGES = 192
"""More teach a detector little."""
_MOST_TO_FIT = 48  # more do not make a better fit
FEW_IMAGES = 16
"""With fewer the fit is worse."""
_LISTS = frozenset({".yaml", ".yml", ".json", ".csv", ".parquet"})

Picture = ImageSource | ImageRecord
"""What can be read as an image."""


def pictures_of(datasets: Sequence[str]) -> list[Picture]:
    """Images of datasets, of the train split where there is one, spread evenly.

    Raises:
        DataError: a dataset cannot be read.
    """
    found = list[Picture]()
    for source in open_joint(datasets).sources if datasets else ():
        records = source.split(TRAIN if TRAIN in source.splits else next(iter(source.splits)))
        share = _spread(len(records), -(-MOST_IMAGES // len(datasets)))
        found += [records[row] for row in share]
    return found[:MOST_IMAGES]


def pictures_at(images: str | Path, out: Path) -> list[Picture]:
    """Images of a folder, a pattern, or a file that lists datasets, spread evenly.

    Args:
        images: The place.
        out: A folder whose images do not count.

    Raises:
        ConfigError: no place is named.
        DataError: there are none.
    """
    if not str(images).strip():
        raise ConfigError(
            "expected a folder or images, found nothing", where="images", hint="name one, or leave it out"
        )
    if Path(images).suffix.lower() in _LISTS:
        return pictures_of([str(images)])
    paths = expanded_paths([images], out)
    if not paths:
        raise DataError("holds no image", where=images, hint="a folder of photos, or a dataset")
    return [paths[row] for row in _spread(len(paths), MOST_IMAGES)]


def _spread(number: int, most: int) -> list[int]:
    """At most so many of a number of rows, at even distances."""
    taken = min(number, most)
    return [row * number // taken for row in range(taken)]


def need_use(target: Target, model: METR) -> None:
    """Stops where images are given and a fit to them is of no use.

    Raises:
        ConfigError: the target or the METR is of another form.
    """
    if has_use(target, model):
        return
    config = model.checkpoint.model
    if not can_fit(config):
        what, hint = "this METR's queries go out as they are: there is nothing to fit", "leave it out"
    elif target.made_up_for is None or not target.fits(config):
        with_fit = [name for name in NAMES if find_target(name).made_up_for is not None]
        what, hint = f"{target.title} has no part that images of this METR fit", f"is for {', '.join(with_fit)}"
    else:
        rest = set(target.differences(config)) - set(target.made_up_for(config))
        what, hint = f"{target.title} differs more than a fit makes up for: {'; '.join(sorted(rest))}", "leave it out"
    raise ConfigError(what, where="images", hint=hint)


def has_use(target: Target, model: METR) -> bool:
    """Whether a fit to images makes up for all in which the target differs from such a METR."""
    config = model.checkpoint.model
    if target.made_up_for is None or not target.fits(config) or not can_fit(config):
        return False
    return set(target.differences(config)) <= set(target.made_up_for(config))


def readable(pictures: Sequence[Picture]) -> list[Picture]:
    """Those that can be read; the others are told.

    Raises:
        DataError: none can be read.
    """
    found = list[Picture]()
    for picture in pictures:
        try:
            load(picture)
        except DataError as error:
            _logger.warning("left out of the fit: %s", error)
        else:
            found.append(picture)
    if pictures and not found:
        raise DataError("none of the images can be read", where="images", hint="see the warnings above")
    return found


def load(picture: Picture) -> ImageSource:
    """An image that `Predictor.prepare` takes.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(picture, ImageRecord):
        return read_image(picture.path, picture.source)
    return load_image(picture, str(picture) if isinstance(picture, str | Path) else "image")


def asking(model: METR, wanted: Vocabulary, text: Float[Tensor, "v t"]) -> Predictor:
    """A METR that looks for names.

    Args:
        model: The METR.
        wanted: The names.
        text: Their embeddings.
    """
    own = model.predictor(Vocabulary.of(wanted.names))
    return Predictor(model.network, text, wanted.names, model.resize, own.config, limits=own.limits)


def fitted(asked: Predictor, pictures: Sequence[Picture], console: Console | None = None) -> ImageFits | None:
    """The fit to images; None if there are none.

    Args:
        asked: The METR, with the names that it is to find.
        pictures: The images, all readable.
        console: Where progress is shown.
    """
    if not pictures:
        return None
    assert isinstance(asked.network, Detector)
    prepared = [asked.prepare(load(pictures[row])) for row in _spread(len(pictures), _MOST_TO_FIT)]
    console = console or Console(quiet=True)

    def batches() -> Images:
        for one in track(prepared, "fitting", console=console, transient=True, disable=not console.is_terminal):
            yield asked.batch([one])

    return fit_to_images(asked.network, asked.text, batches, asked.limits)
