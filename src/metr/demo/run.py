"""The demo's story: draw three datasets, train one detector on all of them, judge it, let it look at new images."""

import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from metr.config import merge, parse_overrides
from metr.data.datasets_file import open_dataset, parse_data_arguments
from metr.data.images import read_image
from metr.data.records import ImageRecord
from metr.demo.datasets import FORMATS, write_demo_datasets, write_unseen
from metr.errors import DataError
from metr.evaluation.results import EvaluationReport
from metr.evaluation.runner import evaluate
from metr.inference.detect_files import detect_files
from metr.inference.draw import contact_sheet, draw_annotations, save_image
from metr.model import METR
from metr.run_directory import RunDirectory
from metr.training.config import RunConfig, laid_over, packaged
from metr.training.signals import Stopped
from metr.training.train import train
from metr.writable import check_folder_to_write


@dataclass(frozen=True, kw_only=True)
class SceneStatistics:
    """Figures of some images.

    `median_side` is that of sqrt(box area / image area); `overlapping` the share of the boxes that have pixels in
    common with another box of their image; `counts` are the boxes of every name.
    """

    images: int
    objects: int
    fewest: int
    most: int
    median_side: float
    overlapping: float
    counts: dict[str, int]


def scene_statistics(records: Iterable[ImageRecord], categories: Sequence[str]) -> SceneStatistics:
    """Figures of the images that `records` describe; `categories` name their labels."""
    per_image: list[int] = []
    sides: list[float] = []
    overlapping: list[bool] = []
    counts = Counter(dict.fromkeys(categories, 0))
    for record in records:
        per_image.append(len(record.boxes))
        size = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(axis=1)
        sides.extend(np.sqrt(size / (record.width * record.height)).tolist())
        overlapping.extend(_touched(record.boxes).tolist())
        counts.update(categories[label] for label in record.labels)
    return SceneStatistics(
        images=len(per_image),
        objects=len(sides),
        fewest=min(per_image, default=0),
        most=max(per_image, default=0),
        median_side=float(np.median(sides)) if sides else 0.0,
        overlapping=float(np.mean(overlapping)) if overlapping else 0.0,
        counts=dict(counts),
    )


def _touched(boxes: Float[np.ndarray, "m 4"]) -> Bool[np.ndarray, "m"]:
    """Which boxes have an area in common with another one."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high[..., 0] > low[..., 0]) & (high[..., 1] > low[..., 1])
    np.fill_diagonal(common, False)
    touched: Bool[np.ndarray, "m"] = common.any(axis=1)
    return touched


TRAIN, VAL, UNSEEN = 120, 40, 9
SEED = 0
# what the demo leaves in its folder
_OURS = {"data", "datasets.png", "run", "evaluation", "unseen", "detections", "detections.png"}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo leaves: the folder, and what it measured."""

    folder: Path
    report: EvaluationReport


def run_demo(
    folder: Path, console: Console, overrides: tuple[str, ...] = (), *, train_images: int = TRAIN
) -> DemoResult:
    """Runs the whole demo inside `folder` and ends by naming what is there.

    Args:
        folder: Made if missing; what an earlier demo left there is replaced.
        console: Where progress is shown.
        overrides: section.key=value, laid over the demo's recipe.
        train_images: Training images of each dataset.

    Raises:
        MetrError: the folder holds something else, or a part is missing.
        Stopped: a signal stopped training.
    """
    recipe = demo_recipe(overrides)
    _refuse_other_content(folder)
    check_folder_to_write(folder)
    console.rule("1. three datasets that nobody merged")
    data = _draw(folder, train_images, console)
    console.rule("2. one detector for all of them")
    run = folder / "run"
    _start_over(run)
    outcome = train(data, run, recipe, console=console)
    if outcome.interrupted:
        console.print("The demo is not done; it begins anew when it is run again.")
        raise Stopped(outcome.signal or signal.SIGINT)
    console.rule("3. how good is it?")
    model = METR.from_pretrained(run)
    report = evaluate(model, data, folder / "evaluation", console=console)
    console.rule("4. images that it has never seen")
    write_unseen(folder / "unseen", SEED, UNSEEN)
    unseen, detections = [folder / "unseen"], folder / "detections"
    detect_files(model.predictor(), unseen, detections, thresholds=model.thresholds(), console=console)
    _sheet(sorted((folder / "detections").glob("*.jpg")), folder / "detections.png")
    _tell(folder, run, console)
    return DemoResult(folder=folder, report=report)


def demo_recipe(overrides: tuple[str, ...] = ()) -> RunConfig:
    """Nano, made smaller and shorter."""
    return laid_over(merge(packaged("nano"), packaged("demo")), [parse_overrides(overrides)], where="demo and --set")


def _draw(folder: Path, train_images: int, console: Console) -> list[str]:
    """Draws the datasets and a page of them; gives them as arguments of a command."""
    total = len(FORMATS) * (train_images + VAL)
    columns = TextColumn("drawing images"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        datasets = write_demo_datasets(folder / "data", SEED, train_images, VAL, lambda _: progress.advance(task))
    for one in datasets:
        told = f"{one.folder} ({one.format}): {', '.join(one.categories)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    data = [str(one.folder) for one in datasets]
    _page_of_truth(data, folder / "datasets.png")
    return data


def _page_of_truth(data: list[str], path: Path) -> None:
    """Two annotated images of each dataset."""
    images, captions = [], []
    for spec in parse_data_arguments(data):
        source = open_dataset(spec)
        for record in (source.split("train")[index] for index in range(2)):
            images.append(draw_annotations(read_image(record.path), record, source.categories))
            captions.append(f"{source.name}: as its owner labelled it")
    save_image(contact_sheet(images, captions, columns=2), path)


def _refuse_other_content(folder: Path) -> None:
    """Keeps the demo from replacing files that are not its own."""
    found = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if found - _OURS or ("run" in found and "data" not in found):
        what = "the demo would write here, but there are files that are not its own"
        raise DataError(what, where=folder, hint="another folder")


def _start_over(run: Path) -> None:
    """Takes an earlier demo's run away: the demo always trains anew."""
    if RunDirectory(run).config.is_file():
        shutil.rmtree(run)


def _sheet(images: list[Path], path: Path) -> None:
    save_image(contact_sheet([read_image(one) for one in images], [one.stem for one in images]), path)


def _tell(folder: Path, run: Path, console: Console) -> None:
    console.rule("done")
    lines = {
        "detections.png": "unseen images, with what was found",
        "datasets.png": "the datasets, as their owners labelled them",
        "evaluation/evaluation.md": "the table",
        "evaluation/evaluation.png": "the same as a chart",
        str(RunDirectory(run).curves.relative_to(folder)): "losses while it learnt",
    }
    console.print(f"Everything is in {folder}", style="bold", markup=False, soft_wrap=True)
    for name, what in lines.items():
        console.print(f"  {name:28} {what}", highlight=False, markup=False)
    told = f"\nOn images of your own:  metr detect {run} IMAGE"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
