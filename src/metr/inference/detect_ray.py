"""Detection in millions of images (`metr detect --engine ray`): actors of Ray Data, each with a detector of its own.

The images are split into numbered parts (`metr.inference.detection_parts`). Ray Data hands the numbers to the actors,
starts actors again that died, and hands out their parts again; an actor detects in a whole part and writes its file.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metr.config import Config
from metr.errors import ConfigError, DataError, MetrError, counted
from metr.inference.detection_parts import FAILED, PartsFolder, Row, answers_rest_on, taken
from metr.inference.image_paths import expanded_images, read_named_image
from metr.inference.predictor import Predictor
from metr.inference.ray_session import RayResources, imported_ray, ray_session

__all__ = ["LoadPredictor", "RayConfig", "RayRun", "detect_with_ray"]

LoadPredictor = Callable[[str], Predictor]
"""Makes the predictor on a device ("cpu" or "cuda"). Each actor calls it once, so it must not hold the detector."""

_logger = logging.getLogger(__name__)
# memory that an actor is expected to take at least
_ACTOR_BYTES = 1 << 30
# images that each reading thread of an actor is ahead of its detector
_AHEAD = 2
_READERS = 8
# tasks that the parts are dealt into, at most: each is an object for ray to keep
_BLOCKS = 10_000
# seconds between two lines of progress where there is no terminal
_EVERY = 30.0


class RayConfig(Config):
    """How many actors detect, and on what."""

    actors: Annotated[int, Field(gt=0)] | None = None
    """Processes with a detector each; by default one for each GPU, or else for each core as far as memory goes."""
    part_size: Annotated[int, Field(gt=0)] | None = None
    """Images of a part, which is one file; by default 1000, or fewer where there would be less than 64 parts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the detectors are; "auto" is the GPUs that ray finds, else the CPU."""
    cpus: Annotated[int, Field(gt=0)] | None = None
    """Cores of this machine that ray may use; by default all. A cluster has its own."""


@dataclass(frozen=True, kw_only=True)
class RayRun:
    """What a call did: `images` and `failed` are counted over all parts, `skipped` parts were complete before it."""

    images: int
    failed: int
    parts: int
    skipped: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Actors:
    """How many actors there are and what each has; `gpu` and `cpu` are shares of ray's, `threads` are of torch."""

    number: int
    cpu: float
    gpu: float
    threads: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


def detect_with_ray(
    load: LoadPredictor,
    images: Sequence[str | Path],
    out: Path,
    *,
    config: RayConfig | None = None,
    console: Console | None = None,
) -> RayRun:
    """Detects objects in any number of images and writes them to Parquet files in `out`, a file for each part.

    Every image is in the files once: with what the plain engine finds in it, or with the reason why it could not be
    read. A call that ends early, whatever ends it, keeps the parts that are complete; the same call goes on with the
    others. A process that dies is started again and its part done again; an image at which it dies repeatedly becomes
    one that could not be read.

    Args:
        load: Makes the predictor, in this process to check that it works and in each actor to detect.
        images: Files, folders, patterns such as `**/*.jpg`, and addresses such as `s3://bucket/folder`. Actors on
            other machines must find all of them, and `out`, at the same paths.
        out: The folder to write; `metr.inference.detection_parts.SCHEMA` says what the files hold.
        config: How many actors there are, and on what.
        console: Where progress and a summary are shown.

    Raises:
        DependencyError: ray is not installed.
        ConfigError: there are not as many GPUs as actors on GPUs.
        DataError: a path does not exist, or none of the images could be read.
        MetrError: `out` holds detections of other images, another detector or other settings; or an actor cannot work.
    """
    console, config = console or Console(quiet=True), config or RayConfig()
    ray = imported_ray()
    paths = expanded_images(images, out)
    rest_on = answers_rest_on(load("cpu"))
    with taken(out):
        folder = PartsFolder.open(out, paths, rest_on, config.part_size)
        del paths  # millions of them: the folder has its own list
        waiting = [part for part in range(folder.parts) if not folder.is_complete(part)]
        skipped = folder.parts - len(waiting)
        what = f"{counted(folder.images, 'image')} in {counted(folder.parts, 'part')} of up to {folder.part_size:,}"
        ready = f"; {counted(skipped, 'part is', 'parts are')} complete already and skipped" if skipped else ""
        _say(console, f"{what}{ready}")
        seconds = _detect(ray, load, folder, waiting, config, console) if waiting else 0.0
        failed = _finish(folder, console)
    return RayRun(images=folder.images, failed=failed, parts=folder.parts, skipped=skipped, seconds=seconds)


def _detect(
    ray: ModuleType,
    load: LoadPredictor,
    folder: PartsFolder,
    waiting: Sequence[int],
    config: RayConfig,
    console: Console,
) -> float:
    """Detects in the parts that are not complete. Seconds from the start of the actors to the end.

    Raises:
        MetrError: an actor cannot work, or ray gives up.
    """
    done = 0
    try:
        with ray_session(ray, config.cpus) as resources:
            actors = _actors(config, resources)
            kind = "GPUs" if actors.gpu else f"CPUs, {counted(actors.threads, 'thread')} each"
            _say(console, f"actors: {actors.number} on {kind}")
            started = time.monotonic()
            images = sum(folder.length(part) for part in waiting)
            with _Shown(images, console) as progress:
                for row in _answers(ray, load, folder, waiting, actors):
                    if row["error"]:
                        raise MetrError(str(row["error"]), where=f"part {row['part']}")
                    if row["deaths"]:
                        died = f"{row['deaths']} times" if row["deaths"] > 1 else "once"
                        _logger.warning(
                            "part %d: the process that detects died %s; it was done again", row["part"], died
                        )
                    done += 1
                    progress.advance(int(row["images"]))
            seconds = time.monotonic() - started
            _say(console, f"{counted(images, 'image')} in {seconds:,.0f} s: {images / seconds:,.1f} images a second")
            return seconds
    finally:
        if done < len(waiting):
            complete = folder.parts - len(waiting) + done
            _say(
                console,
                f"{complete:,} of {folder.parts:,} parts are complete; the same command goes on with the others",
            )


def _answers(
    ray: ModuleType, load: LoadPredictor, folder: PartsFolder, waiting: Sequence[int], actors: _Actors
) -> Iterator[Mapping[str, Any]]:
    """What the actors say of each part, as the parts become complete."""
    parts = ray.data.from_items([{"part": part} for part in waiting], override_num_blocks=min(len(waiting), _BLOCKS))
    told = parts.map_batches(
        _Detecting,
        fn_constructor_kwargs={"load": load, "folder": folder, "device": actors.device, "threads": actors.threads},
        batch_size=1,
        # a part waits beside the one in work, so that an actor never waits for the next
        compute=ray.data.ActorPoolStrategy(size=actors.number, max_tasks_in_flight_per_actor=2),
        num_cpus=actors.cpu,
        num_gpus=actors.gpu,
    )
    try:
        yield from told.iter_rows()
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = "METR_DEBUG=1 shows more; the same command goes on"
        raise MetrError(f"ray gave up: {lines[-1]}", where="ray", hint=hint) from error


def _actors(config: RayConfig, resources: RayResources) -> _Actors:
    """How many actors there are and what each gets.

    Raises:
        ConfigError: GPUs are asked for and there are none, or fewer than actors.
    """
    on_gpu = config.device == "cuda" or (config.device == "auto" and resources.gpus > 0)
    if on_gpu:
        number = config.actors or max(1, resources.gpus)
        if number > resources.gpus:
            what = f"expected a GPU for each of {number} actors, ray finds {resources.gpus}"
            raise ConfigError(what, where="--actors", hint="fewer actors, or --device cpu")
    else:
        room = max(1, psutil.virtual_memory().available // _ACTOR_BYTES)
        number = config.actors or min(resources.cpus, room)
    whole = max(1, resources.cpus // number)
    # more actors than cores share them, since ray would wait for cores for ever
    share = float(whole) if number <= resources.cpus else resources.cpus / number
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdecimal() else whole
    return _Actors(number=number, cpu=share, gpu=1.0 if on_gpu else 0.0, threads=max(1, threads))


class _Detecting:
    """An actor of Ray Data: detects in one part after the other and writes their files."""

    def __init__(self, load: LoadPredictor, folder: PartsFolder, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.load, self.folder, self.device = load, folder, device
        self.readers = min(_READERS, max(2, threads))
        self.predictor: Predictor | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Detects in the parts of a batch: a row of counts for each, or of the error that stops the run."""
        told = [self._tell(int(part)) for part in batch["part"]]
        return {key: np.array([row[key] for row in told]) for key in ("part", "images", "deaths", "error")}

    def _tell(self, part: int) -> dict[str, Any]:
        row: dict[str, Any] = {"part": part, "images": 0, "deaths": 0, "error": ""}
        try:
            if not self.folder.is_complete(part):  # it is where the process died after it had written
                row["deaths"] = self._detect(part)
        except (MetrError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            # as a text: ray would wrap the error, and print the traceback of another process
            return row | {"error": _in_words(error)}
        return row | {"images": self.folder.length(part)}

    def _detect(self, part: int) -> int:
        """Writes a part; how many earlier attempts at it ended early."""
        journal = self.folder.journal(part)
        if journal.is_hopeless:
            what = f"the process that detects died {counted(len(journal.attempts), 'time')} before it reached an image"
            raise MetrError(what, where=self.folder.file(part), hint="fewer actors (--actors), if memory was short")
        journal.begin()
        if self.predictor is None:
            self.predictor = self.load(self.device)
        images = self.folder.images_of(part)
        if not journal.attempts:
            rows = list(_rows(self.predictor, images, self.readers))
        else:
            rows = []
            for position, image in enumerate(images):
                if position in journal.fatal:
                    rows.append(Row(image=image, error="the process that detects died at this image, twice"))
                else:
                    journal.at(position)
                    rows += _rows(self.predictor, [image], 1)
        self.folder.write(part, rows)
        journal.close()
        return len(journal.attempts)


def _rows(predictor: Predictor, images: Sequence[str], readers: int) -> Iterator[Row]:
    """What a predictor finds in images, in their order; they are read by threads while it detects."""
    failed: dict[int, str] = {}
    read: list[int] = []

    def arrays() -> Iterator[np.ndarray]:
        for position, found in enumerate(_read_ahead(images, readers)):
            if isinstance(found, DataError):
                failed[position] = found.what
            else:
                read.append(position)
                yield found

    predictions = list(predictor.detect_many(arrays()))
    answered = dict(zip(read, predictions, strict=True))
    for position, image in enumerate(images):
        if position in failed:
            yield Row(image=image, error=failed[position])
        else:
            one = answered[position]
            error = None if one.issue is None else one.issue.detail
            yield Row(image=image, size=one.size, detections=one.detections, error=error)


def _read_ahead(images: Iterable[str], readers: int) -> Iterator[np.ndarray | DataError]:
    """Each image, or why it cannot be read, in their order; threads read a few ahead."""
    waiting: deque[Future[np.ndarray | DataError]] = deque()
    rest = iter(images)
    with ThreadPoolExecutor(readers) as pool:
        waiting.extend(pool.submit(_read, image) for image in islice(rest, _AHEAD * readers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_read, image) for image in islice(rest, 1))


def _read(image: str) -> np.ndarray | DataError:
    try:
        return read_named_image(image)
    except DataError as error:
        return error


def _in_words(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory: {str(error).splitlines()[0]}\n  try: a smaller --batch-size"
    if isinstance(error, MemoryError):
        return "out of memory\n  try: fewer actors (--actors)"
    return str(error)


def _finish(folder: PartsFolder, console: Console) -> int:
    """Checks that every part is there, lists the images without an answer, and tells how many there are.

    Raises:
        MetrError: a part is missing: somebody removed it.
        DataError: no image could be read.
    """
    missing = [part for part in range(folder.parts) if not folder.is_complete(part)]
    if missing:
        what = f"{counted(len(missing), 'part has', 'parts have')} disappeared, such as {folder.file(missing[0]).name}"
        raise MetrError(what, where=folder.path, hint="the same command makes them again")
    failed, first = folder.write_failed()
    if first is not None:
        what = f"{failed:,} of {counted(folder.images, 'image')} could not be read, such as {first[0]}: {first[1]}"
        _say(console, f"{what}; {FAILED} lists them", style="yellow")
        if failed == folder.images:
            what = f"none of {counted(failed, 'image')} could be read: {first[1]}"
            raise DataError(what, where=first[0], hint=f"{folder.path / FAILED} has the reasons")
    _say(console, f"detections-*.parquet of all {folder.images:,} images are in {folder.path}")
    return failed


class _Shown:
    """Progress: a bar with images a second and the time left on a terminal, a line now and then elsewhere."""

    def __init__(self, images: int, console: Console) -> None:
        self.images, self.done = images, 0
        self._first: tuple[float, int] | None = None
        self._said = time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("detecting", total=images, rate="")
        self._lines = not console.is_terminal and not console.quiet

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Counts images of another part."""
        now = time.monotonic()
        self.done += images
        rate = 0.0
        if self._first is None:  # the first parts took the start of the processes with them
            self._first = (now, self.done)
        elif now > self._first[0]:
            rate = (self.done - self._first[1]) / (now - self._first[0])
        self._bar.update(self._task, completed=self.done, rate=f"{rate:,.1f} images/s" if rate else "")
        if self._lines and rate and now - self._said >= _EVERY:
            self._said = now
            left = timedelta(seconds=round((self.images - self.done) / rate))
            _logger.info("%s of %s images, %.1f a second, %s left", f"{self.done:,}", f"{self.images:,}", rate, left)


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
