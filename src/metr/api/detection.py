"""The verb detect: pictures and folders in, drawn pictures and COCO results out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from metr.api.model import METR
from metr.data.images import read_image
from metr.engine.tensors import write_json
from metr.errors import DataError
from metr.evaluation.coco import coco_results
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.inference.predictor import Prediction
from metr.inference.visualize import draw_detections, save_picture
from metr.structures import Detections

RESULTS = "detections.json"
# pictures that are summed up in a line of their own
_LISTED = 20
# endings of what is looked for in a folder; a picture that is named itself may be called anything
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"))


def detect_files(
    source: str | Path,
    pictures: Sequence[Path],
    out: Path,
    *,
    names: Sequence[str] | None,
    threshold: float,
    batch_size: int,
    console: Console,
) -> list[Prediction]:
    """Detects in every picture, draws what was found into `out`, and writes `out/detections.json`.

    The JSON has `images` (id, file name, size), `categories` (id, name) and `annotations` in COCO's results form
    (image_id, category_id, bbox as x, y, width, height in pixels, score).

    Raises:
        DataError: a path does not exist, or none of them holds a readable picture.
        CheckpointError: there is no such checkpoint.
    """
    paths = _expanded(pictures)
    model = METR.from_pretrained(source)
    config = InferenceConfig(batch_size=batch_size, postprocess=PostprocessConfig(score_threshold=threshold))
    predictor = model.predictor(names, config)
    out.mkdir(parents=True, exist_ok=True)
    done = []
    for path, drawn, prediction in zip(
        paths, _drawn_names(paths), predictor.detect_many(_shown(paths, console)), strict=True
    ):
        done.append(prediction)
        if prediction.detections is not None:
            save_picture(draw_detections(read_image(path), prediction.detections, threshold), out / drawn)
    write_json(out / RESULTS, _as_coco(done, predictor.names))
    _report(done, out, console)
    return done


def _expanded(pictures: Sequence[Path]) -> list[Path]:
    """Every picture that is named, or lies in a folder that is named."""
    found: list[Path] = []
    for path in pictures:
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in PICTURES and item.is_file())
            if not inside:
                endings = ", ".join(sorted(PICTURES))
                raise DataError("no picture in this folder", where=path, hint=f"pictures end in {endings}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError("no such picture or folder", where=path, hint="check the path")
    return list(dict.fromkeys(found))


def _drawn_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each drawn picture; where several pictures share one, they are numbered."""
    names: list[str] = []
    for path in paths:
        name, number = f"{path.stem}.jpg", 2
        while name in names:
            name, number = f"{path.stem}-{number}.jpg", number + 1
        names.append(name)
    return names


def _shown(paths: Sequence[Path], console: Console) -> Iterator[Path]:
    """The paths, under a progress bar."""
    yield from track(paths, "detecting", console=console, transient=True)


def _as_coco(predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, object]:
    """Detections as COCO has them; ids count from 1 in the order of pictures and names."""
    numbered = list(enumerate(predictions, 1))
    found: dict[int | str, Detections] = {n: one.detections for n, one in numbered if one.detections is not None}
    images = [
        {"id": number, "file_name": one.source, "height": one.size[0], "width": one.size[1]}
        for number, one in numbered
        if one.size is not None
    ]
    ids = {name: number for number, name in enumerate(names, 1)}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "categories": categories, "annotations": coco_results(found, ids)}


def _report(predictions: Sequence[Prediction], out: Path, console: Console) -> None:
    """One line a picture for the first few, the faults, and where everything is.

    Raises:
        DataError: no picture could be read.
    """
    read = [one for one in predictions if one.detections is not None]
    for one in read[:_LISTED]:
        console.print(f"{one.source}: {_summary(one)}", highlight=False, markup=False)
    if len(read) > _LISTED:
        console.print(f"and {len(read) - _LISTED} more")
    for one in predictions:
        if one.fault is not None:
            console.print(f"skipped {one.source}: {one.fault.detail}", style="yellow", markup=False)
    if not read:
        raise DataError("none of the pictures could be read", where=predictions[0].source, hint="open one of them")
    console.print(f"pictures and {RESULTS} are in {out}", markup=False)


def _summary(prediction: Prediction) -> str:
    """How many of each name were found."""
    assert prediction.detections is not None
    counts = Counter(prediction.detections.names[row] for row in prediction.detections.labels.tolist())
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing found"
