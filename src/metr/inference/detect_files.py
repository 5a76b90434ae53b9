"""Detection in image files (`metr detect`): writes drawn images and COCO results."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from metr.data.images import read_image
from metr.errors import DataError
from metr.inference.config import Form, Labels
from metr.inference.draw import Style, draw_detections, palette, save_image
from metr.inference.image_paths import ImagesToDraw, images_to_draw
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Prediction, Predictor
from metr.inference.result_files import IMAGES, RESULTS, ResultFiles
from metr.inference.saving import SavedForms
from metr.inference.tiles import TiledPredictor
from metr.structures import Detections

# images that are summed up in a line of their own
_LISTED = 20
# the longer side, in pixels, below which an image is enlarged before it is drawn on
_LEAST_SIDE = 640
# the steps in which a lower threshold is suggested
_SUGGESTED = 0.05


def detect_files(
    predictor: Predictor | TiledPredictor,
    images: Sequence[str | Path] | ImagesToDraw,
    out: Path,
    *,
    thresholds: ScoreThresholds | None = None,
    labels: Labels = "names",
    forms: Sequence[Form] = (),
    console: Console | None = None,
) -> list[Prediction]:
    """Detects objects in every image, draws them into `out`, and writes them there as COCO results.

    `out/detections.json` is in COCO's results form: a list of image_id, category_id, bbox (x, y, width, height in
    pixels) and score. It holds all that the predictor gives, weak detections included, so that its average precision
    is that of an evaluation; drawings and the summary are limited by `thresholds`. `out/images.json` says what the ids
    mean: `images` (id, file_name, height, width) and `categories` (id, name), so that
    `COCO("images.json").loadRes("detections.json")` works. Until they are written, `out/detections.partial.jsonl` has
    what was found in each image so far.

    Args:
        predictor: Decides the names; `METR.predictor` makes one.
        images: Files, folders whose images are taken (those of their subfolders too), and patterns such as `**/*.jpg`;
            or what `images_to_draw` made of them, for `out`, before the detector was loaded.
        out: The folder to write; made if missing.
        thresholds: The score from which detections are drawn and counted; `METR.thresholds` gives those of a model.
        labels: What is written at each drawn box. Images with sides under 640 pixels are enlarged for that.
        forms: What else is written of the detections that are drawn; see `SavedForms`.
        console: Where progress and a summary are shown.

    Raises:
        DataError: a path does not exist, none holds a readable image, or a drawing would overwrite a given image.
    """
    console = console or Console(quiet=True)
    files = images if isinstance(images, ImagesToDraw) else images_to_draw(images, out)
    thresholds, style = thresholds or ScoreThresholds(), Style(labels=labels, colours=palette(predictor.names))
    confident: list[Prediction] = []
    strongest = 0.0
    with (
        ResultFiles(out, predictor.names, len(files.paths), console) as results,
        SavedForms(out, predictor.names, forms) as saved,
    ):
        predictions = predictor.detect_many(_shown(files.paths, console))
        for path, target, prediction in zip(files.paths, files.drawings, predictions, strict=True):
            results.add(prediction)
            if prediction.detections is not None:
                shown = replace(prediction, detections=thresholds.shown(prediction.detections))
                confident.append(shown)
                strongest = max([strongest, *prediction.detections.scores[:1].tolist()])
                image = read_image(path)
                _draw(image, shown.detections, style, target)
                saved.add(image, shown, target.stem)
    _report(results.done, confident, out, console)
    if not any(map(_found, confident)) and strongest >= _SUGGESTED:
        lower = math.floor(strongest / _SUGGESTED) * _SUGGESTED
        what = f"the surest detection has a score of {strongest:.2f}: --threshold {lower:.2f} would show it"
        console.print(what, highlight=False, soft_wrap=True)
    return results.done


def _found(prediction: Prediction) -> int:
    """The number of detections."""
    return 0 if prediction.detections is None else len(prediction.detections)


def _draw(image: np.ndarray, detections: Detections | None, style: Style, target: Path) -> None:
    """Draws detections, on an enlarged image if it is small."""
    assert detections is not None
    longest = max(*image.shape[:2], _LEAST_SIDE)
    save_image(draw_detections(image, detections, 0.0, longest, style), target)


def _shown(paths: Sequence[Path], console: Console) -> Iterator[Path]:
    """The paths, under a progress bar if there is a terminal."""
    yield from track(paths, "detecting", console=console, transient=True, disable=not console.is_terminal)


def _report(predictions: Sequence[Prediction], read: Sequence[Prediction], out: Path, console: Console) -> None:
    """Prints a line for each of the first images, the issues, and where the files are.

    `read` are the predictions of readable images, with the detections that are shown.

    Raises:
        DataError: no image could be read.
    """
    for one in read[:_LISTED]:
        console.print(f"{one.source}: {_summary(one)}", highlight=False, markup=False, soft_wrap=True)
    if len(read) > _LISTED:
        console.print(f"and {len(read) - _LISTED} more")
    for one in predictions:
        if one.issue is not None:
            console.print(f"skipped {one.source}: {one.issue.detail}", style="yellow", markup=False, soft_wrap=True)
    if not read:
        only = len(predictions) == 1
        what = "the image could not be read" if only else f"none of {len(predictions):,} images could be read"
        raise DataError(what, where=predictions[0].source, hint="open it in a viewer")
    console.print(f"images, {RESULTS} and {IMAGES} are in {out}", markup=False, soft_wrap=True)


def _summary(prediction: Prediction) -> str:
    """How many of each name were found."""
    assert prediction.detections is not None
    counts = Counter(prediction.detections.names[row] for row in prediction.detections.labels.tolist())
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing found"
