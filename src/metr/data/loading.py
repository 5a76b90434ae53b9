"""Loaders: endless batches for training; each image once for evaluation."""

import atexit
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import cv2
import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch.utils.data import DataLoader, Dataset

from metr.data.collate import Collated, PipedBatch, collate, free_shared_memory, padded_shape, sent
from metr.data.config import LoaderConfig
from metr.data.dataset import UNREACHABLE, DetectionDataset, Example, Missing, MixedDataset
from metr.data.joint import shards_of_images
from metr.data.records import DataIssue
from metr.data.sampling import EpochImages, MixedSampler, mixture_weights, repeat_factors
from metr.errors import DataError, StoreError
from metr.structures import Batch

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
# What the main process alone answers. Schedulers send these to all processes of a job.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_workers: WeakSet[Any] = WeakSet()
# The bytes of shared memory without which no worker can be started: each needs locks there.
_LEAST_SHARED = 1 << 20
_SOCKETS_LOCK = "metr.lock"
_LARGER = "Make /dev/shm larger (docker run --shm-size=8g, or --ipc=host), or free it"
Result = TypeVar("Result")


class IssueList:
    """Images that could not be read, each listed once, the first ones logged."""

    LOGGED = 20

    def __init__(self) -> None:
        self._found: dict[str, DataIssue] = {}

    def add(self, issues: Iterable[DataIssue]) -> None:
        """Lists the issues that are new."""
        for issue in issues:
            if issue.where not in self._found:
                self._found[issue.where] = issue
                if len(self._found) <= self.LOGGED:
                    log.warning("%s, skipped: %s (%s)", issue.kind, issue.where, issue.detail)
                elif len(self._found) == self.LOGGED + 1:
                    log.warning("more than %d images cannot be read; the others are counted", self.LOGGED)

    def restore(self, issues: Iterable[DataIssue]) -> None:
        """Lists issues that an earlier process has found and logged."""
        self._found.update((issue.where, issue) for issue in issues)

    def all(self) -> tuple[DataIssue, ...]:
        """Every issue so far."""
        return tuple(self._found.values())


class TrainLoader:
    """Endless batches of mixed datasets, from where `sampler` starts.

    Batch s of a run is a function of the seed and s, so a run that resumes at `sampler.samples_after(s)` goes on with
    exactly the batches that it would have had. The sampler divides samples among processes: do not shard the loader
    again.
    """

    def __init__(self, loader: DataLoader[Any], sampler: MixedSampler, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        self._loader, self._issues = loader, IssueList()

    def __iter__(self) -> Iterator[Batch]:
        """Batches on the device, without end.

        Raises:
            DataError: too many images in a row cannot be read, or a process that reads images died.
            StoreError: a shard cannot be reached.
        """
        for collated in _collated(self._loader):
            self._issues.add(collated.issues)
            if collated.missing or collated.batch is None:
                missing = collated.missing[0]
                what = f"{len(missing.issues)} images in a row cannot be read; the first: {missing.issues[0].where}"
                raise DataError(what, where=missing.dataset, hint=f"{missing.issues[0].detail}; metr inspect lists all")
            yield collated.batch.unpack(self.device)

    @property
    def issues(self) -> tuple[DataIssue, ...]:
        """The images that could not be read so far, and were replaced."""
        return self._issues.all()

    def restore_issues(self, issues: Iterable[DataIssue]) -> None:
        """Lists the images that could not be read before the run was resumed."""
        self._issues.restore(issues)


class EvaluationLoader:
    """Every readable image of a dataset once, in batches whose images have the same padded shape.

    Images come in the dataset's order where all have one shape. Else they are grouped by shape, and `in_order` sorts
    results back into the dataset's order.
    """

    def __init__(self, loader: DataLoader[Any], batches: Sequence[Sequence[int]], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._loader, self._issues = loader, IssueList()
        self._positions: list[int] = []

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Batches on the device.

        Raises:
            DataError: a process that reads images died.
            StoreError: a shard cannot be reached.
        """
        self._positions = []
        for collated in _collated(self._loader):
            self._issues.add(collated.issues)
            if collated.batch is not None:
                self._positions.extend(collated.batch.positions)
                yield collated.batch.unpack(self.device)

    @property
    def issues(self) -> tuple[DataIssue, ...]:
        """The images that could not be read, and are not in any batch."""
        return self._issues.all()

    def in_order(self, results: Sequence[Result]) -> list[Result]:
        """One result for each image, in the order in which the loader gave them, sorted into the dataset's order."""
        pairs = sorted(zip(self._positions, results, strict=True), key=lambda pair: pair[0])
        return [result for _, result in pairs]


def build_train_loader(
    datasets: Sequence[DetectionDataset],
    config: LoaderConfig,
    *,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
    batches: int | None = None,
) -> TrainLoader:
    """The loader of a training run.

    Args:
        datasets: What to mix.
        config: Batch size, workers, mixture.
        seed: Decides order and augmentation.
        start: Samples already taken by all processes (`sampler.samples_after`), to resume a run.
        rank: This process's number.
        world: The number of processes.
        device: Where batches go.
        batches: Of each process in the whole run, after a fraction of which mosaics end. None: they never end.

    Raises:
        DataError: a dataset has no image.
        ConfigError: the mixture does not fit the datasets, or two datasets have one name.
    """
    mixed = MixedDataset(datasets, None if batches is None else batches * config.batch_size * world)
    weights = mixture_weights(mixed.lengths, config.mixture)
    images = {one.name: _images(one, config) for one in datasets}
    sizes = datasets[0].transforms.config.sizes
    sampler = MixedSampler(images, weights, config.batch_size, seed, rank, world, sizes, start)
    workers = spare_cores() if config.workers is None else config.workers
    loader = _loader(mixed, sampler, config.multiple, workers, config.prefetch, device)
    return TrainLoader(loader, sampler, device)


def build_evaluation_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    workers: int | None = None,
    multiple: int = 32,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> EvaluationLoader:
    """A loader of all images of `dataset`; of `world` processes each gets its share of the images of every shape.

    Args:
        dataset: A dataset with evaluation transforms.
        batch_size: Images a batch, at most.
        workers: Processes that read images; None for the spare cores.
        multiple: Pixels: sides are padded to multiples of this.
        rank: This process's number.
        world: The number of processes.
        device: Where batches go.
    """
    batches = shape_groups(dataset, range(len(dataset)), batch_size, multiple, rank, world)
    workers = min(len(batches), spare_cores() if workers is None else workers)
    return EvaluationLoader(_loader(dataset, batches, multiple, workers, 2, device), batches, device)


def shape_groups(
    dataset: DetectionDataset,
    indices: Iterable[int],
    batch_size: int,
    multiple: int,
    rank: int = 0,
    world: int = 1,
) -> list[list[int]]:
    """Indices in batches of one padded shape, so that no image's answer depends on its neighbours' shapes.

    Of `world` processes each gets a share of every shape, so that all have as much to do. The shares of a shape, and
    those of all, differ by one image at most.
    """
    transforms = dataset.transforms
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        # Only where the aspect is kept do records need to be read for their shapes.
        if transforms.config.resize.mode == "stretch":
            shape = transforms.shape(1, 1)
        else:
            record = dataset.annotations[index]
            shape = transforms.shape(record.height, record.width)
        groups.setdefault(padded_shape(*shape, multiple), []).append(index)
    batches: list[list[int]] = []
    dealt = 0
    for group in groups.values():
        share = group[(rank - dealt) % world :: world]  # dealing goes on where the last group ended
        dealt += len(group)
        batches += [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
    return batches


def _images(dataset: DetectionDataset, config: LoaderConfig) -> int | Float[np.ndarray, "n"] | EpochImages:
    """How many images a dataset has, or how often an epoch shows each of them; and their shards where these decide."""
    images: int | Float[np.ndarray, "n"] = len(dataset)
    if config.repeat_threshold:
        factors = images = repeat_factors(dataset.annotations, config.repeat_threshold)
        message = "%s: an epoch shows images of rare categories up to %.1f times: about %.0f samples of %d images"
        log.info(message, dataset.name, factors.max(initial=1.0), factors.sum(), len(factors))
    shards = shards_of_images(dataset.annotations) if config.shards_at_once else None
    if shards is None:
        return images
    return EpochImages(images=images, shards=shards, shards_at_once=config.shards_at_once)


def spare_cores() -> int:
    """The number of cores besides the one of the main process, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores - 1))


def _loader(
    dataset: Dataset[Any],
    batch_sampler: Iterable[list[Any]],
    multiple: int,
    workers: int,
    prefetch: int,
    device: torch.device,
) -> DataLoader[Any]:
    free = free_shared_memory()
    if workers and free is not None and free < _LEAST_SHARED:
        log.warning("no worker reads images: %s %s", f"{free:,} bytes of shared memory are free, too few.", _LARGER)
        workers = 0
    if workers:
        _share_socket_folder()
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=partial(_collate, multiple=multiple, workers=workers),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=device.type in ("cuda", "xpu"),
        # Random numbers come with each sample key. With a generator of its own the loader leaves the global one alone,
        # whose state would otherwise depend on how often loaders were started.
        generator=torch.Generator(),
    )


@cache
def _share_socket_folder() -> FileLock:
    """Gives the sockets of all workers one folder, which goes with this process; removes those of killed processes.

    Otherwise multiprocessing makes a folder for each worker, and one that is killed leaves it in /tmp for ever. Who
    lives holds the lock in its folder, which gets its name when it is held: nobody takes a new folder for an old one.
    """
    lock = FileLock(Path(get_temp_dir(), f"{_SOCKETS_LOCK}.new"))
    with suppress(OSError, NotImplementedError):
        lock.acquire(blocking=False)
        Path(lock.lock_file).rename(Path(get_temp_dir(), _SOCKETS_LOCK))
        for other in Path(tempfile.gettempdir()).glob(f"pymp-*/{_SOCKETS_LOCK}"):
            with suppress(OSError, Timeout), FileLock(other, blocking=False):
                shutil.rmtree(other.parent, ignore_errors=True)
    return lock


def _collate(examples: Sequence[Example | Missing], multiple: int, workers: int) -> Collated | PipedBatch:
    collated = collate(examples, multiple)
    return sent(collated, workers) if workers else collated


def _start_worker(_worker: int) -> None:
    """Gives OpenCV one thread a process, so that processes do not compete, and leaves signals to the main process.

    A worker ends with its main process, however that dies. torch's own loop looks for it every few seconds, and never
    while a batch is stuck in a pipe that nobody reads. Until then the worker would hold the lock of the run folder.
    """
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _end_with_main_process() -> None:
    """Waits until the main process is dead, then ends this one at once: there is nobody left to work for."""
    if (main := multiprocessing.parent_process()) is not None:
        main.join()
        shutil.rmtree(get_temp_dir(), ignore_errors=True)  # the main process's, of which this one is a copy
        os._exit(1)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Blocks signals in processes that are started in this block, until `_start_worker` ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_workers() -> None:
    """Kills the workers of a loader that an error has left open.

    multiprocessing sends them SIGTERM, which they ignore, and would wait for them for ever.
    """
    left = [process for process in multiprocessing.active_children() if process in _workers]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
    for process in left:
        process.kill()


def _collated(loader: DataLoader[Any]) -> Iterator[Collated]:
    with explained_loss_of_workers():
        with _signals_held_back():
            batches = iter(loader)
        _workers.update(getattr(batches, "_workers", ()))
        piped = False
        for batch in batches:
            if isinstance(batch, PipedBatch):
                if not piped:
                    log.warning(
                        "batches take a slower way: %d MB of shared memory are free. %s", batch.free >> 20, _LARGER
                    )
                piped = True
            collated = batch.whole() if isinstance(batch, PipedBatch) else batch
            for issue in collated.issues:
                if issue.kind == UNREACHABLE:
                    hint = "check the store and the network, then go on with --resume"
                    raise StoreError(issue.detail, where=issue.where, hint=hint)
            yield collated


@contextmanager
def explained_loss_of_workers() -> Iterator[None]:
    """Replaces what torch raises when a worker dies: wherever the main process is just then, in a signal handler.

    Raises:
        DataError: a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        what = f"a process that reads images died: {str(error).rstrip()}"
        hint = "perhaps too little memory: use fewer workers (loader.workers), or 0; a run that trains can be resumed"
        raise DataError(what, where="data loader", hint=hint) from error
