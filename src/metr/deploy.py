"""Runs an exported METR with NumPy and ONNX Runtime (or OpenVINO) alone: this one file, no torch, nothing else of METR.

    from metr.deploy import Detector

    detector = Detector("exported")
    for box, score, name in detector.detect("street.jpg"):
        print(name, round(score, 2), box)

`metr export` puts a copy of it beside the model, so that `python exported/deploy.py street.jpg` works where METR is not
installed. Files of images need Pillow; arrays need nothing.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Detections", "Detector", "main"]

DESCRIPTION = "export.json"
VERSION = 2
_BATCH = 8
_TINY = np.finfo(np.float32).tiny
_EPS = 1e-6
_NO_NAME = 2.0  # a presence threshold that no row of text reaches

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Sequence[Array]]
"""Runs the model: inputs by name to boxes, scores and labels."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    `boxes` [n 4] are corners (x0, y0, x1, y1) in pixels of the image as it was given, `scores` [n] in 0..1, and
    `labels` [n] are rows of `names`. Iterating gives (box, score, name).
    """

    boxes: Array
    scores: Array
    labels: Array
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[list[float], float, str]]:
        for box, score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True):
            yield box, score, self.names[label]

    def where(self, keep: Array) -> "Detections":
        """Those that `keep` chooses: truth values or positions."""
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.names)


@dataclass(frozen=True)
class _Names:
    """Names, scale and shift [n 2] of the logits of their scores, and, if names are an input, those of the model."""

    names: tuple[str, ...]
    thresholds: Mapping[str, float]
    calibration: Array
    inputs: Mapping[str, Array]


class Detector:
    """An exported detector.

    Args:
        folder: What `metr export` wrote.
        names: For a model with open names: an `.npz` of names as `metr export --format names` writes it; by default
            the one beside the model.
        threads: How many threads the runtime uses; by default as many as it likes.
        bf16: OpenVINO computes in bfloat16 where the processor does (AMX): faster, scores differ by about 0.01.
        run: Runs the model in place of ONNX Runtime and OpenVINO.

    Raises:
        ValueError: the folder, the names or the model are not what is expected.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        names: str | Path | None = None,
        *,
        threads: int | None = None,
        bf16: bool = False,
        run: Run | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.description = _description(self.folder)
        self._resize: dict[str, Any] = self.description["resize"]
        self._post: dict[str, Any] = self.description["postprocess"]
        self._named = _names(self.description, self.folder, names)
        self._run = run or _runtime(self.folder / self.description["model"], threads, bf16)

    @property
    def names(self) -> tuple[str, ...]:
        """What it looks for."""
        return self._named.names

    def detect(self, images: Any, threshold: float | None = None) -> Any:
        """Finds objects: those whose score reaches the threshold, one name for each place, as `METR.detect`.

        Args:
            images: A path, an RGB array [h w 3] of bytes or a PIL image; or a list of such.
            threshold: The least score, 0..1; by default 0.3, or a name's own, where METR has kept one.

        Returns:
            The detections of the image, best first; a list of them for a list of images.
        """
        if not isinstance(images, list):
            return self._shown(self.predict([images])[0], threshold)
        return [self._shown(found, threshold) for found in self.predict(images)]

    def predict(self, images: Sequence[Any]) -> list[Detections]:
        """All detections of each image, weak ones included, after suppression inside each name."""
        found: dict[int, Detections] = {}
        groups: dict[tuple[int, int], list[tuple[int, Array, tuple[int, int]]]] = {}
        for index, image in enumerate(images):
            pixels = _rgb(image)
            size = (int(pixels.shape[0]), int(pixels.shape[1]))
            resized = _resized(pixels, *_output_shape(*size, self._resize), self._resize["filter"])
            multiple = self.description["multiple"]
            padded = -(-resized.shape[0] // multiple) * multiple, -(-resized.shape[1] // multiple) * multiple
            groups.setdefault(padded, []).append((index, resized, size))
        for padded, group in groups.items():
            for start in range(0, len(group), _BATCH):
                part = group[start : start + _BATCH]
                answers = self._answers([resized for _, resized, _ in part], padded)
                for (index, _, size), *answer in zip(part, *answers, strict=True):
                    found[index] = self._finished(answer, size)
        return [found[index] for index in range(len(images))]

    def _answers(self, images: Sequence[Array], shape: tuple[int, int]) -> Sequence[Array]:
        block = np.empty((len(images), *shape, 3), dtype=np.uint8)
        block[:] = self.description["fill"]
        for row, image in zip(block, images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image
        pixels = np.ascontiguousarray(block.transpose(0, 3, 1, 2))
        given: dict[str, Array] = {
            "images": pixels if self.description["pixels"] == "uint8" else pixels.astype(np.float32) / 255
        }
        if "sizes" in self.description["inputs"]:
            given["sizes"] = np.array([image.shape[:2] for image in images], dtype=np.int64)
        return self._run(given | dict(self._named.inputs))

    def _finished(self, answer: Sequence[Array], size: tuple[int, int]) -> Detections:
        """Boxes in pixels, suppression and limits, for one image."""
        boxes, scores, labels = answer
        scores = self._calibrated(scores, labels)
        boxes, scores, labels = (each[np.argsort(-scores, kind="stable")] for each in (boxes, scores, labels))
        height, width = size
        boxes = boxes * np.array([width, height, width, height], dtype=np.float32)
        keep = (scores >= self._post["score_threshold"]) & (_area(boxes) > 0)
        found = Detections(boxes[keep], scores[keep], labels[keep], self.names)
        rivals = np.zeros_like(found.labels) if self._post["nms_across_names"] else found.labels
        best = _survivors(found.boxes, rivals, self._post["nms_iou"], self._post["max_detections"])
        return found.where(best)

    def _calibrated(self, scores: Array, labels: Array) -> Array:
        """The scores as probabilities of being right; what is no detection keeps its score of -1."""
        scale, shift = self._named.calibration[labels].T
        with np.errstate(over="ignore"):
            moved = 1 / (1 + (1 / np.clip(scores, _EPS, 1 - _EPS) - 1) ** scale * np.exp(-shift))
        return np.where((scores < 0) | ((scale == 1) & (shift == 0)), scores, moved).astype(np.float32)

    def _shown(self, found: Detections, threshold: float | None) -> Detections:
        default = self.description["threshold"] if threshold is None else threshold
        own = {} if threshold is not None else self._named.thresholds
        least = np.array([own.get(name, default) for name in self.names], dtype=np.float32)
        found = found.where(found.scores >= least[found.labels])
        same = np.zeros_like(found.labels)
        return found.where(_survivors(found.boxes, same, self.description["same_place"], len(found)))


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: expected a folder of metr export, found no {DESCRIPTION}") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); export the detector again") from None
    if not isinstance(values, dict) or values.get("format") != "metr export":
        raise ValueError(f"{path}: not of metr export")
    if values.get("format_version") != VERSION:
        what = f"format version {values.get('format_version')!r}, this file reads {VERSION}"
        raise ValueError(f"{path}: {what}; take the deploy.py beside the model")
    return dict(values)


def _names(description: Mapping[str, Any], folder: Path, given: str | Path | None) -> _Names:
    """The names of the model, or those of a file if names are an input."""
    rows = description["open_names"]
    if rows is None:
        if given is not None:
            raise ValueError(f"{folder}: its names are fixed; export it with --names open to choose them later")
        kept = [description["calibration"].get(name, (1, 0)) for name in description["names"]]
        return _Names(tuple(description["names"]), description["thresholds"], np.array(kept, dtype=np.float32), {})
    path = folder / "names.npz" if given is None else Path(str(given))
    if not path.is_file():
        raise ValueError(f"{path}: no such file; names are in an .npz of metr export --format names")
    with np.load(path, allow_pickle=False) as stored:
        names = tuple(str(name) for name in stored["names"])
        text, presence, thresholds, calibration, source = (
            stored[key] for key in ("embeddings", "presence", "thresholds", "calibration", "detector")
        )
    if str(source) != description["detector"]:
        raise ValueError(f"{path}: made for another detector; metr export --format names with that of {folder}")
    if not 0 < len(names) <= rows:
        raise ValueError(f"{path}: {len(names)} names, and the model takes 1 to {rows}")
    padded = np.zeros((rows, text.shape[1]), dtype=np.float32)
    padded[: len(names)] = text
    # where all names fit, each gets queries, however unlikely it is
    least = np.full(rows, _NO_NAME, dtype=np.float32)
    least[: len(names)] = 0.0 if len(names) <= description["kept_names"] else presence
    known = {name: float(least) for name, least in zip(names, thresholds, strict=True) if np.isfinite(least)}
    return _Names(names, known, calibration, {"text": padded, "presence": least})


def _runtime(model: Path, threads: int | None, bf16: bool) -> Run:
    if not model.is_file():
        raise ValueError(f"{model}: no such model; export the detector again")
    if model.suffix not in {".onnx", ".xml"}:
        raise ValueError(f"{model}: runs in PyTorch; pass run=, or export with --format onnx or openvino")
    try:
        return _onnx_runtime(model, threads) if model.suffix == ".onnx" else _openvino(model, threads, bf16)
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own
        why = " ".join(str(error).split()[-20:])
        raise ValueError(f"{model}: cannot be loaded ({why}); export the detector again") from error


def _onnx_runtime(model: Path, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = threads or 0  # 0: as many as it likes
    providers = [one for one in onnxruntime.get_available_providers() if one.startswith(("CUDA", "CPU"))]
    session = onnxruntime.InferenceSession(str(model), options, providers=providers)

    return lambda given: list(session.run(None, dict(given)))


def _openvino(model: Path, threads: int | None, bf16: bool) -> Run:
    import openvino

    core = openvino.Core()
    has = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # said aloud, as some processors would else round to bfloat16
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if bf16 and has else "f32"}
    compiled = core.compile_model(str(model), "CPU", {**options, "INFERENCE_NUM_THREADS": threads or 0})

    def run(given: Mapping[str, Array]) -> Sequence[Array]:
        answers = compiled(dict(given))
        return [answers[index] for index in range(len(compiled.outputs))]

    return run


def _rgb(image: Any) -> Array:
    """An image as RGB bytes [h w 3], turned as its EXIF orientation says; what is transparent is laid on white."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"expected RGB bytes [height, width, 3], found {image.dtype} {list(image.shape)}")
        return image
    from PIL import Image, ImageOps

    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            opened.load()
            return _rgb(opened)
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a path, an RGB array or a PIL image, found {type(image).__name__}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in {"LA", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        return np.asarray((rgba[..., :3] * rgba[..., 3:] + 127) // 255 + 255 - rgba[..., 3:], dtype=np.uint8)
    return np.asarray(image.convert("RGB"))


def _output_shape(height: int, width: int, resize: Mapping[str, Any]) -> tuple[int, int]:
    size, (short, long) = resize["size"], sorted((height, width))
    if resize["mode"] == "stretch":
        return size, size
    exact = resize["longest"] * short / long if long / short * size > resize["longest"] else size
    shorter, longer = max(1, round(exact)), max(1, int(exact * long / short))
    return (height, width) if short == shorter else (shorter, longer) if height <= width else (longer, shorter)


def _resized(image: Array, height: int, width: int, method: str) -> Array:
    """The image at another size: with `area` averaged over areas if it shrinks, interpolated if it grows.

    OpenCV does it if it is installed, as in METR. NumPy's numbers differ from its by at most one.
    """
    if image.shape[:2] == (height, width):
        return image
    if method != "area":
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[method.upper()]))
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    try:
        import cv2
    except ImportError:
        weights = _areas if shrinks else _neighbours
        rows = np.tensordot(weights(image.shape[0], height), image.astype(np.float32), axes=1)
        both = np.tensordot(weights(image.shape[1], width), rows, axes=(1, 1)).transpose(1, 0, 2)
        return np.floor(both + 0.5).clip(0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def _areas(given: int, wanted: int) -> Array:
    """Which fraction of each wanted pixel is of each given one: [wanted given]."""
    edges = np.arange(wanted + 1) * (given / wanted)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(given)
    covered = np.minimum(high, pixels + 1) - np.maximum(low, pixels)
    return np.asarray(covered.clip(0) * (wanted / given), dtype=np.float32)


def _neighbours(given: int, wanted: int) -> Array:
    """The weights of linear interpolation between the centres of pixels: [wanted given]."""
    place = ((np.arange(wanted) + 0.5) * (given / wanted) - 0.5).clip(0, given - 1)
    return (1 - np.abs(place[:, None] - np.arange(given))).clip(0).astype(np.float32)


def _area(boxes: Array) -> Array:
    return np.asarray(np.prod((boxes[..., 2:] - boxes[..., :2]).clip(0), axis=-1))


def _survivors(boxes: Array, rivals: Array, iou: float | None, limit: int) -> Array:
    """Positions of at most `limit` boxes, best first, that no better survivor with equal `rivals` overlaps by more."""
    if iou is None:
        return np.arange(len(boxes))[:limit]
    alive, areas = np.ones(len(boxes), dtype=bool), _area(boxes)
    kept: list[int] = []
    for index in range(len(boxes)):
        if len(kept) == limit:
            break
        if alive[index]:
            kept.append(index)
            low = np.maximum(boxes[index, :2], boxes[:, :2])
            high = np.minimum(boxes[index, 2:], boxes[:, 2:])
            overlap = _area(np.concatenate([low, high], axis=1))
            union = areas[index] + areas - overlap
            alive &= ~((overlap / np.maximum(union, _TINY) > iou) & (rivals == rivals[index]))
    return np.array(kept, dtype=np.int64)


def main(arguments: Sequence[str]) -> int:
    """Prints what is in images: `python deploy.py [FOLDER] IMAGE...`; FOLDER is where this file lies by default.

    An image that cannot be read is told and left out; the exit code is 1 then, or where the detector cannot be loaded.
    """
    here = bool(arguments) and Path(arguments[0]).is_dir()
    folder, images = (Path(arguments[0]), arguments[1:]) if here else (Path(__file__).parent, arguments)
    if not images or images[0] in {"-h", "--help"}:
        sys.stderr.write("python deploy.py [FOLDER] IMAGE...: FOLDER is of metr export\n")
        return 0 if images else 2
    try:
        detector = Detector(folder)
    except (ImportError, OSError, ValueError) as error:
        return _told(str(error))
    failed = 0
    for image in images:
        try:
            found = detector.detect(image)
        except ImportError as error:
            return _told(f"{error}; image files are read with Pillow")
        except (OSError, ValueError) as error:
            failed = _told(f"{image}: {error}")
            continue
        for box, score, name in found:
            corners = " ".join(f"{side:.1f}" for side in box)
            sys.stdout.write(f"{image}: {name} {score:.2f} at {corners}\n")
        if not len(found):
            sys.stdout.write(f"{image}: nothing found\n")
    return failed


def _told(error: str) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
