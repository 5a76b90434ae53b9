"""Index: what the annotations of a dataset of the size of Objects365 cost in time and memory.

    python benchmarks/index.py                    # about 6 GB of disk, see --scratch
    python benchmarks/index.py --scale 0.1

Writes a made-up dataset of 1.7 million images and 25 million boxes as COCO JSON (see `index_source.py`), then
measures, each in a process of its own:

    build     seconds and peak memory (resident, of the process and of any it starts) of opening it the first time
    open      seconds of opening it again, with the index in the system's page cache and without
    workers   what each of 8 worker processes of a DataLoader holds for itself once it has read thousands of random
              records, beyond what a worker holds that reads none

The dataset has no split of its own, so building includes holding out a fifth. For comparison, the same of pycocotools'
COCO class (where it is installed), at a tenth of the size, because it holds everything as Python objects. Linux only:
memory is read from /proc. The result is written to `results/index-cpu.json`.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from index_source import Source, write_source
from machine import commit, hardware
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError, MetrError

BUILD_BAR, OPEN_BAR, WORKER_BAR = 4 * 2**30, 1.0, 30e6  # bytes, seconds, bytes
# How much smaller the file is that pycocotools reads.
REFERENCE_SHARE = 0.1
# How worker processes start: they have all that their parent has, and copy what they write to.
START = "fork"
# What the kernel tells of a process's memory.
MEMORY = Path("/proc/self/smaps_rollup")

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    scale: float = 1.0
    workers: int = 8
    records: int = 5000
    seed: int = 0
    scratch: Path | None = None
    keep: bool = False
    results: Path = Path(__file__).resolve().parent / "results"


class Reads(Dataset[int]):
    """Each item is a worker's whole work: it reads random records, and gives the process's number."""

    def __init__(self, read: Callable[[int], object], length: int, records: int) -> None:
        self.read, self.length, self.records = read, length, records

    def __getitem__(self, item: int) -> int:
        for index in np.random.default_rng(item).integers(self.length, size=self.records).tolist():
            self.read(index)
        return os.getpid()


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """The whole benchmark, as written to the file."""
    facts = _facts(settings)
    source = _apart(write_source, folder / "source", scale=settings.scale, seed=settings.seed)
    cache = folder / f"cache-{os.getpid()}"
    metr = {
        "source": source.facts(),
        "build": _apart(build, source, cache),
        "open_uncached": _apart(open_again, source, cache, cached=False),
        "open": _apart(open_again, source, cache, cached=True),
        "workers": _apart(read_in_workers, source, cache, settings.workers, settings.records),
    }
    return facts | {"bars": _bars(metr), "metr": metr, "pycocotools": _reference(settings, folder)}


def build(source: Source, cache: Path) -> dict[str, Any]:
    """Reads the dataset for the first time, and checks what came out."""
    before = peak_memory()
    began, began_cpu = time.perf_counter(), time.process_time()
    dataset = _opened(source, cache)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    # the kernel counts pages in batches: what is read later may be a few of them lower
    peak = max(before, peak_memory())
    counts = [annotations.counts() for annotations in dataset.splits.values()]
    boxes = sum(int(each.boxes.sum() + each.ignored.sum()) for each in counts)
    found = (sum(each.images for each in counts), boxes, dataset.issue_counts.get("degenerate box", 0))
    expected = (source.images, source.boxes - source.degenerate, source.degenerate)
    if found != expected:
        what = f"images, boxes and degenerate ones are {found}, expected {expected}"
        raise DataError(what, where=cache, hint="the index is wrong: this is a bug")
    size = sum(annotations.path.stat().st_size for annotations in dataset.splits.values())
    facts = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "peak_bytes_before": before}
    return facts | {"format": dataset.format, "index_bytes": size}


def open_again(source: Source, cache: Path, *, cached: bool) -> dict[str, Any]:
    """Opens the dataset whose index is there; if not `cached`, its pages are dropped from memory before."""
    state = _state(cache)
    for path in () if cached else state:
        _drop_pages(path)
    began = time.perf_counter()
    _opened(source, cache)
    return {"seconds": time.perf_counter() - began, "reused": _state(cache) == state}


def read_in_workers(source: Source, cache: Path, workers: int, records: int) -> dict[str, Any]:
    """Private memory of workers that read random records of the index."""
    annotations = _opened(source, cache).split("train")
    return _private_of_workers(annotations.__getitem__, len(annotations), workers, records)


def read_with_pycocotools(path: Path, workers: int, records: int) -> dict[str, Any]:
    """pycocotools' COCO class: seconds and peak memory of loading, private memory of workers that read from it."""
    before = peak_memory()
    began, began_cpu = time.perf_counter(), time.process_time()
    coco = import_module("pycocotools.coco").COCO(path)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    loading = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_memory(), "peak_bytes_before": before}
    ids = coco.getImgIds()

    def read(index: int) -> object:
        return coco.loadImgs(ids[index]), coco.loadAnns(coco.getAnnIds(ids[index]))

    return {"build": loading, "workers": _private_of_workers(read, len(ids), workers, records)}


def peak_memory() -> int:
    """The most resident memory so far, in bytes, of this process and of the largest that it started."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def private_memory(process: int) -> dict[str, int]:
    """What a process maps that no other one does, in bytes; `written` is what it cannot give back to a file."""
    values: dict[str, int] = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        key, value = line.split()[:2]
        values[key.rstrip(":")] = 1024 * int(value)
    written = values["Private_Dirty"] + values.get("Private_Hugetlb", 0)
    return {"all": values["Private_Clean"] + written, "written": written}


def _private_of_workers(read: Callable[[int], object], length: int, workers: int, records: int) -> dict[str, Any]:
    """Private memory of each worker beyond the mean of those that read nothing."""
    gc.collect()
    empty = _private_of_each(Reads(_nothing, length, records), workers)
    began = time.perf_counter()
    full = _private_of_each(Reads(read, length, records), workers)
    seconds = time.perf_counter() - began
    base = {key: sum(each[key] for each in empty) / workers for key in ("all", "written")}
    return {
        "start_method": START,
        "records_each": records,
        "seconds": seconds,
        "empty_worker_bytes": base["all"],
        "beyond_empty_bytes": [each["all"] - base["all"] for each in full],
        "written_beyond_empty_bytes": [each["written"] - base["written"] for each in full],
    }


def _private_of_each(reads: Reads, workers: int) -> list[dict[str, int]]:
    """Private memory of each worker, while all are alive and have done their work."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores
        loader = DataLoader(
            reads,
            batch_size=None,
            sampler=range(workers),
            num_workers=workers,
            prefetch_factor=1,
            multiprocessing_context=START,
        )
        iterator = iter(loader)
        processes = [next(iterator) for _ in range(workers)]
    return [private_memory(process) for process in processes]


def _nothing(_index: int) -> None:
    pass


def _opened(source: Source, cache: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="objects365", path=source.root), cache)


def _state(cache: Path) -> dict[Path, tuple[int, int]]:
    """The files of the cache, and what would change if they were written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*") if path.is_file()}


def _drop_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _apart(work: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """The result of a function that runs in a new process, so that nothing else counts as its memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **options).result()


def _reference(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """pycocotools at a tenth of the size; None where it is not installed."""
    if find_spec("pycocotools") is None:
        return None
    scale = REFERENCE_SHARE * settings.scale
    source = _apart(write_source, folder / "reference", scale=scale, seed=settings.seed, links=False)
    found = _apart(read_with_pycocotools, source.annotations, settings.workers, settings.records)
    return {"source": source.facts()} | found


def _bars(metr: dict[str, Any]) -> dict[str, Any]:
    values = {
        "build_peak_bytes": (metr["build"]["peak_bytes"], BUILD_BAR),
        "open_seconds": (metr["open"]["seconds"], OPEN_BAR),
        "worker_bytes": (max(metr["workers"]["beyond_empty_bytes"]), WORKER_BAR),
    }
    return {name: {"value": value, "bar": bar, "met": value <= bar} for name, (value, bar) in values.items()}


def _facts(settings: Settings) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(settings).items() if name not in ("results", "scratch", "keep")}
    return {
        "benchmark": "index",
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": commit(),
        "settings": kept,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The result as a table."""
    metr, other = result["metr"], result["pycocotools"]
    source = metr["source"]
    console.print(f"{source['json_bytes'] / 1e9:.2f} GB of COCO JSON, read as {metr['build']['format']}")
    console.print(f"{source['scattered']:.0%} of the annotations stand apart from the others of their image")
    console.print(f"images: {source['images']}")
    table = Table("", _headed("METR", metr), _headed("pycocotools", other), "bar", title=result["hardware"])
    for row in zip(*_cells(result), strict=True):
        table.add_row(*row)
    console.print(table)
    reused = "yes" if metr["open"]["reused"] and metr["open_uncached"]["reused"] else "[red]no[/]"
    console.print(f"the index is used again while the source is unchanged: {reused}")


def _cells(result: dict[str, Any]) -> list[list[str]]:
    """The columns of the table, its first one to begin with."""
    bars, cells = result["bars"], []
    for each in (result["metr"], result["pycocotools"]):
        if each is None:
            cells.append([""] * 7)
            continue
        build, workers = each["build"], each["workers"]
        cells.append([f"{build['seconds']:.1f}", f"{build['cpu_seconds']:.1f}", f"{build['peak_bytes'] / 2**30:.2f}"])
        cells[-1] += [f"{each[key]['seconds']:.2f}" if key in each else "" for key in ("open", "open_uncached")]
        cells[-1] += [_range(workers[key]) for key in ("beyond_empty_bytes", "written_beyond_empty_bytes")]
    titles = ["build, s", "... of a processor", "... peak memory, GiB", "open again, s", "... not in the page cache"]
    titles += ["a worker's own memory, MB", "... written to"]
    peak, worker = _judged(bars["build_peak_bytes"], 2**30), _judged(bars["worker_bytes"], 1e6)
    return [titles, *cells, ["", "", peak, _judged(bars["open_seconds"]), "", worker, ""]]


def _headed(name: str, measured: dict[str, Any] | None) -> str:
    if measured is None:
        return f"{name}\nnot installed"
    return f"{name}\n{measured['source']['images']:,} images\n{measured['source']['boxes']:,} boxes"


def _range(values: Sequence[float]) -> str:
    return f"{min(values) / 1e6:.1f} to {max(values) / 1e6:.1f}"


def _judged(bar: dict[str, Any], unit: float = 1) -> str:
    return f"at most {bar['bar'] / unit:g}: {'met' if bar['met'] else '[red]missed[/]'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 0, or 1 with one message where something is missing."""
    console, settings = Console(), _settings(arguments)
    try:
        if not MEMORY.is_file():
            raise DataError(f"no {MEMORY}", where=sys.platform, hint="run it on Linux")
        if settings.keep and settings.scratch is not None:
            result = measure(settings, settings.scratch)
        else:
            with tempfile.TemporaryDirectory(prefix="metr-index-", dir=settings.scratch) as folder:
                result = measure(settings, Path(folder))
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    show(result, console)
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / "index-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {path}", markup=False)
    return 0


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--scale", type=float, default=default.scale, help="the size, relative to Objects365")
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--records", type=int, default=default.records, help="what each worker reads")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--scratch", type=Path, help="the folder to write to; that of temporary files by default")
    parser.add_argument("--keep", action="store_true", help="leave what is written to --scratch, and find it again")
    parser.add_argument("--results", type=Path, default=default.results)
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
