"""Detection in image files (`metr detect`): writes drawn images and COCO results."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track

from metr.bounded_yaml import load_yaml_file, yaml_fault
from metr.data.images import read_image
from metr.errors import ConfigError, DataError, did_you_mean
from metr.inference.draw import Labels, Style, draw_detections, palette, save_image
from metr.inference.image_paths import expanded_paths, real_path
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Prediction, Predictor
from metr.inference.result_files import IMAGES, RESULTS, ResultFiles
from metr.structures import Detections

# images that are summed up in a line of their own
_LISTED = 20
# the longer side, in pixels, below which an image is enlarged before it is drawn on
_LEAST_SIDE = 640
_YAML = {".yaml", ".yml"}
_PHRASES = re.compile(r":\s*\[")


def detect_files(
    predictor: Predictor,
    images: Sequence[str | Path],
    out: Path,
    *,
    thresholds: ScoreThresholds | None = None,
    labels: Labels = "names",
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
        images: Files, folders whose images are taken (those of their subfolders too), and patterns such as `**/*.jpg`.
        out: The folder to write; made if missing.
        thresholds: The score from which detections are drawn and counted; `METR.thresholds` gives those of a model.
        labels: What is written at each drawn box. Images with sides under 640 pixels are enlarged for that.
        console: Where progress and a summary are shown.

    Raises:
        DataError: a path does not exist, none holds a readable image, or a drawing would overwrite a given image.
    """
    console = console or Console(quiet=True)
    paths = expanded_paths(images, out)
    drawn = _drawn(paths, out)
    thresholds, style = thresholds or ScoreThresholds(), Style(labels=labels, colours=palette(predictor.names))
    confident = []
    with ResultFiles(out, predictor.names, len(paths), console) as results:
        for path, target, prediction in zip(paths, drawn, predictor.detect_many(_shown(paths, console)), strict=True):
            results.add(prediction)
            if prediction.detections is not None:
                shown = thresholds.shown(prediction.detections)
                confident.append(replace(prediction, detections=shown))
                _draw(read_image(path), shown, style, target)
    _report(results.done, confident, out, console)
    return results.done


def names_to_find(categories: str | None, file: Path | None) -> list[str] | dict[str, list[str]] | None:
    """The names that a command asks for; None if it names none.

    Args:
        categories: Names between commas.
        file: Names, one a line, lines that begin with `#` left out; or YAML: a list of names, or a mapping from each
            name to the phrase or phrases that describe it.

    Raises:
        ConfigError: both are given, or the file cannot be read or names nothing.
    """
    if file is None:
        return None if categories is None else [name.strip() for name in categories.split(",")]
    if categories is not None:
        raise ConfigError("expected --categories or --categories-file, found both", where="--categories-file")
    hint = "write one name a line; or a .yaml file: name: [phrase, another phrase]"
    if not file.is_file():
        raise ConfigError("no such file of names", where=file, hint="check the path")
    try:
        if file.suffix in _YAML:
            values = load_yaml_file(file, as_written=True)
        else:
            values = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the file of names cannot be read: {yaml_fault(error)}", where=file, hint=hint) from None
    if isinstance(values, dict) and values:
        phrases = {name: [some] if isinstance(some, str) else some for name, some in values.items()}
        if all(isinstance(name, str) and _are_texts(some) for name, some in phrases.items()):
            return phrases
    elif isinstance(values, list):
        names = [name for name in values if name and not str(name).startswith("#")]
        if file.suffix not in _YAML and (yaml_line := next((name for name in names if _PHRASES.search(name)), None)):
            raise ConfigError(
                f"a line that looks like YAML: {yaml_line}", where=file, hint="end the file's name in .yaml"
            )
        if _are_texts(names):
            return names
    raise ConfigError("expected names", where=file, hint=hint)


def _are_texts(values: object) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(one, str) and one.strip() for one in values)


def check_labels(labels: str) -> Labels:
    """What is written at drawn boxes.

    Raises:
        ConfigError: it is not one of names, scores and none.
    """
    known = get_args(Labels)
    if labels not in known:
        raise ConfigError(f"no kind of labels {labels!r}", where="--labels", hint=did_you_mean(labels, known))
    return cast("Labels", labels)


def _drawn(paths: Sequence[Path], out: Path) -> list[Path]:
    """The path of each drawn image; images that share a name are numbered.

    Raises:
        DataError: an image would be drawn over one of the given images.
    """
    names: dict[str, None] = {}
    for path in paths:
        name, number = f"{path.stem}.jpg", 2
        while name in names:
            name, number = f"{path.stem}-{number}.jpg", number + 1
        names[name] = None
    originals = {real_path(path) for path in paths}
    for name in names:
        if real_path(out / name) in originals:
            raise DataError("a drawing would take the place of this image", where=out / name, hint="another -o")
    return [out / name for name in names]


def _draw(image: np.ndarray, detections: Detections, style: Style, target: Path) -> None:
    """Draws detections, on an enlarged image if it is small."""
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
