"""What do the annotations of a dataset of the size of Objects365 cost in time and memory?

    python benchmarks/index.py                    # about 6 GB of disk, see --scratch
    python benchmarks/index.py --scale 0.1

Writes a synthetic dataset of 1.7 million images and 25 million boxes as COCO JSON, then measures, each in a process of
its own:

    build     seconds and peak memory (resident, of the process and of any it starts) of opening it the first time,
              which includes holding out a fifth for evaluation
    open      seconds of opening it again, with the index in the system's page cache and without
    workers   what each of 8 worker processes of a DataLoader holds for itself once it has read thousands of random
              records, beyond what a worker holds that reads none

For comparison, the same of pycocotools' COCO class (where it is installed), at a tenth of the size, because it holds
everything as Python objects. Linux only: memory is read from /proc.

One thread of an AMD EPYC (results/index-cpu.json): built with at most 2.4 GiB in 173 seconds of processor time, opened
again in 0.1 s, at most 3.5 MB a worker; pycocotools, at a tenth of the size: 2.2 GiB, and 200 MB a worker.

Results: `results/index-cpu.json` and `.md`.
"""

import gc
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

import report
import runner
from metr.config import Tree
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError

BUILD_BAR, OPEN_BAR, WORKER_BAR = 4 * 2**30, 1.0, 30e6  # bytes, seconds, bytes
REFERENCE_SCALE = 0.1  # of the file that pycocotools reads
START = "fork"  # worker processes have all that their parent has, and copy what they write to
MEMORY = Path("/proc/self/smaps_rollup")
IMAGES, BOXES, NAMES, FOLDERS = 1_700_000, 25_000_000, 365, 51
SCATTERED = 0.2  # fraction of the annotations that stand anywhere in the file, not beside the others of their image
CROWDS, FAKES, DEGENERATE = 0.015, 0.005, 1e-4
SIZES = np.array([(512, 769), (683, 1024), (768, 1024), (1024, 683), (375, 500), (1080, 1920)])  # (height, width)
BLOCK = 20_000  # rows that are written at a time; each block has another number of decimals, 2 to 6
Result = TypeVar("Result")


class Reads(Dataset[int]):
    """Each item is a worker's whole work: it reads random records, and gives the process's number."""

    def __init__(self, read: Callable[[int], object], length: int, records: int) -> None:
        self.read, self.length, self.records = read, length, records

    def __getitem__(self, item: int) -> int:
        for index in np.random.default_rng(item).integers(self.length, size=self.records).tolist():
            self.read(index)
        return os.getpid()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="the size, relative to Objects365")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--records", type=int, default=5000, help="what each worker reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="the folder to write to; that of temporary files by default")
    given = vars(parser.parse_args(arguments))

    def work() -> bool:
        if not MEMORY.is_file():
            raise DataError(f"no {MEMORY}", where=sys.platform, hint="run it on Linux")
        with tempfile.TemporaryDirectory(prefix="metr-index-", dir=given["scratch"]) as folder:
            result = measure(given, Path(folder))
        report.write_result(given["results"] / "index-cpu", result, page(result))
        return True

    return runner.exit_status(work)


def measure(options: Mapping[str, Any], folder: Path) -> Tree:
    """The result as the JSON file has it."""
    settings = {key: options[key] for key in ("scale", "workers", "records", "seed")}
    facts = runner.circumstances("index", runner.commit(), "cpu") | {"settings": settings}
    scale, seed, readers = options["scale"], options["seed"], (options["workers"], options["records"])
    root, cache = folder / "source", folder / "cache"
    source = apart(write_source, root, scale, seed)
    metr = {
        "source": source,
        "build": apart(build, root, cache, source),
        "open_uncached": apart(open_again, root, cache, False),
        "open": apart(open_again, root, cache, True),
        "workers": apart(read_in_workers, root, cache, *readers),
    }
    bars = {
        "build_peak_bytes": report.bar(metr["build"]["peak_bytes"], BUILD_BAR),
        "open_seconds": report.bar(metr["open"]["seconds"], OPEN_BAR),
        "worker_bytes": report.bar(max(metr["workers"]["beyond_empty_bytes"]), WORKER_BAR),
    }
    other = None
    if find_spec("pycocotools") is not None:
        source = apart(write_source, folder / "reference", REFERENCE_SCALE * scale, seed, False)
        other = {"source": source, **apart(read_with_pycocotools, folder / "reference", *readers)}
    return facts | {"bars": bars, "metr": metr, "pycocotools": other}


def apart(work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a function that runs in a new process, so that nothing else counts as its memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def opened(root: Path, cache: Path) -> DatasetSource:
    """The dataset; its index is built where the cache has none."""
    return open_dataset(DatasetConfig(name="objects365", path=root), cache)


def loading(load: Callable[[], Result]) -> tuple[Result, Tree]:
    """What was loaded; the seconds that took, and the most memory of this process before and so far, in bytes."""
    before, began, began_cpu = peak_memory(), time.perf_counter(), time.process_time()
    loaded = load()
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
    # the kernel counts pages in batches: what is read later may be a few of them lower
    return loaded, {**seconds, "peak_bytes": max(before, peak_memory()), "peak_bytes_before": before}


def build(root: Path, cache: Path, source: Tree) -> Tree:
    """Reads the dataset for the first time, and checks what came out."""
    dataset, facts = loading(lambda: opened(root, cache))
    counts = [annotations.counts() for annotations in dataset.splits.values()]
    boxes = sum(int(each.boxes.sum() + each.ignored.sum()) for each in counts)
    found = (sum(each.images for each in counts), boxes, dataset.issue_counts.get("degenerate box", 0))
    expected = (source["images"], source["boxes"] - source["degenerate"], source["degenerate"])
    if found != expected:
        what = f"images, boxes and degenerate ones are {found}, expected {expected}"
        raise DataError(what, where=cache, hint="the index is wrong: this is a bug")
    size = sum(annotations.path.stat().st_size for annotations in dataset.splits.values())
    return facts | {"format": dataset.format, "index_bytes": size}


def open_again(root: Path, cache: Path, cached: bool) -> Tree:
    """Opens the dataset whose index is there; if not `cached`, its pages are dropped from memory before."""

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*") if path.is_file()}

    before = state()
    for path in () if cached else before:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    opened(root, cache)
    return {"seconds": time.perf_counter() - began, "reused": state() == before}


def read_in_workers(root: Path, cache: Path, workers: int, records: int) -> Tree:
    """Private memory of workers that read random records of the index."""
    annotations = opened(root, cache).split("train")
    return private_of_workers(annotations.__getitem__, len(annotations), workers, records)


def read_with_pycocotools(root: Path, workers: int, records: int) -> Tree:
    """pycocotools' COCO class: seconds and peak memory of loading, private memory of workers that read from it."""
    coco, facts = loading(lambda: import_module("pycocotools.coco").COCO(annotation_file(root)))
    ids = coco.getImgIds()

    def read(index: int) -> object:
        return coco.loadImgs(ids[index]), coco.loadAnns(coco.getAnnIds(ids[index]))

    return {"build": facts, "workers": private_of_workers(read, len(ids), workers, records)}


def peak_memory() -> int:
    """The most resident memory so far, in bytes, of this process and of the largest that it started."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def private_memory(process: int) -> dict[str, int]:
    """What a process maps that no other one does, in bytes; `written` is what it cannot give back to a file."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    values = {key: 1024 * int(value) for key, value, *_ in map(str.split, lines)}
    written = values["Private_Dirty:"] + values.get("Private_Hugetlb:", 0)
    return {"all": values["Private_Clean:"] + written, "written": written}


def private_of_workers(read: Callable[[int], object], length: int, workers: int, records: int) -> Tree:
    """Private memory of each worker beyond the mean of those that read nothing."""
    gc.collect()
    empty = private_of_each(Reads(lambda _: None, length, records), workers)
    began = time.perf_counter()
    full = private_of_each(Reads(read, length, records), workers)
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


def private_of_each(reads: Reads, workers: int) -> list[dict[str, int]]:
    """Private memory of each worker, while all are alive and have done their work."""
    options: Tree = {"batch_size": None, "num_workers": workers, "prefetch_factor": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores
        iterator = iter(DataLoader(reads, sampler=range(workers), multiprocessing_context=START, **options))
        processes = [next(iterator) for _ in range(workers)]
    return [private_memory(process) for process in processes]


def annotation_file(root: Path) -> Path:
    """The COCO file in a dataset's folder."""
    return root / "annotations" / "instances_train.json"


def write_source(root: Path, scale: float, seed: int, with_images: bool = True) -> Tree:
    """Writes a synthetic dataset of the shape of Objects365 and tells what is in it; no image has pixels.

    Reading finds images by name only, so a folder's first image is an empty file and the others are hard links to it: a
    million names that take hardly any inodes.
    """
    began, rng = time.perf_counter(), np.random.default_rng(seed)
    images, boxes = max(1, round(IMAGES * scale)), max(1, round(BOXES * scale))
    ids = np.cumsum(rng.integers(1, 3, images))  # they grow, with gaps
    sizes = SIZES[rng.integers(len(SIZES), size=images)]
    folders = np.arange(images) * FOLDERS // images
    names = [f"patch{folder}/objects365_v1_{one:08d}.jpg" for folder, one in zip(folders, ids, strict=True)]
    path = annotation_file(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        file.write('{"info": {"version": "2.0"}, "licenses": [{"id": 5, "name": "none"}], "images": [')
        image = '{"height": %d, "id": %d, "license": 5, "width": %d, "file_name": "images/v1/%s", "url": ""}'
        rows = zip(sizes[:, 0].tolist(), ids.tolist(), sizes[:, 1].tolist(), names, strict=True)
        for start, row in zip(count(), rows, strict=False):
            file.write((", " if start else "") + image % row)
        file.write('], "annotations": [')
        degenerate = write_annotations(file, rng, ids, sizes, boxes)
        categories = [{"id": number, "name": f"thing number {number}"} for number in range(1, NAMES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    stored = link_images(root / "train", names) if with_images else "none"
    return {
        "scale": scale,
        "seed": seed,
        "images": images,
        "boxes": boxes,
        "degenerate": degenerate,
        "json_bytes": path.stat().st_size,
        "stored": stored,
        "seconds": time.perf_counter() - began,
        "scattered": SCATTERED,
    }


def write_annotations(file: TextIO, rng: np.random.Generator, ids: np.ndarray, sizes: np.ndarray, boxes: int) -> int:
    """Writes the boxes, block by block, and counts those without a width."""
    # some images are crowded, some have none; a few categories are frequent, most are rare
    crowding, frequency = np.cumsum(rng.gamma(1.2, size=len(ids))), np.cumsum(1 / np.arange(1, NAMES + 1))
    owners = np.searchsorted(crowding, np.sort(rng.random(boxes)) * crowding[-1])
    scattered = rng.random(boxes) < SCATTERED
    owners[scattered] = rng.permutation(owners[scattered])
    degenerate = 0
    for block, start in enumerate(range(0, boxes, BLOCK)):
        mine = owners[start : start + BLOCK]
        limits = sizes[mine][:, ::-1].astype(np.float64)
        sides = np.clip(rng.lognormal(-2, 0.9, limits.shape) * limits, 2, limits)
        xywh = np.concatenate([rng.random(limits.shape) * (limits - sides), sides], axis=1)
        xywh[rng.random(len(mine)) < DEGENERATE, 2] = 0
        degenerate += int((xywh[:, 2] == 0).sum())
        labels = np.searchsorted(frequency, rng.random(len(mine)) * frequency[-1]) + 1
        crowds, fakes = ((rng.random(len(mine)) < share).astype(int) for share in (CROWDS, FAKES))
        form = f"%.{2 + block % 5}f"
        row = (
            f'{{"id": %d, "iscrowd": %d, "isfake": %d, "area": {form}, "isreflected": 0, '
            f'"bbox": [{", ".join([form] * 4)}], "image_id": %d, "category_id": %d}}'
        )
        columns = [crowds, fakes, xywh[:, 2] * xywh[:, 3], *xywh.T, ids[mine], labels]
        values = zip(range(start + 1, start + 1 + len(mine)), *(column.tolist() for column in columns), strict=True)
        file.write((", " if start else "") + ", ".join(row % each for each in values))
    return degenerate


def link_images(folder: Path, names: Sequence[str]) -> str:
    """Puts the names in place, and says how."""
    empty: dict[Path, Path] = {}
    files = 0
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(empty[path.parent], path)
        except (KeyError, OSError):  # the first of its folder, or no more links are allowed
            path.touch()
            empty[path.parent] = path
            files += 1
    return f"{len(names)} names, hard links to {files} empty files in {len(empty)} folders"


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: METR's index, pycocotools, and the bars."""
    metr, bars = result["metr"], result["bars"]
    both = {"METR": metr, "pycocotools": result["pycocotools"]}
    both = {f"{name}, {one['source']['boxes']:,} boxes": one for name, one in both.items() if one is not None}

    def row(title: str, value: Callable[[Mapping[str, Any]], str], bar: str = "", unit: float = 1) -> list[str]:
        return [title, *map(value, both.values()), report.bar_text(bars[bar], unit) if bar else ""]

    def memory(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda one: f"{min(one['workers'][key]) / 1e6:.1f} to {max(one['workers'][key]) / 1e6:.1f}"

    def opening(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda one: f"{one[key]['seconds']:.2f}" if key in one else ""

    rows = [
        row("build, s", lambda one: f"{one['build']['seconds']:.1f}"),
        row("... of a processor", lambda one: f"{one['build']['cpu_seconds']:.1f}"),
        row("... peak memory, GiB", lambda one: f"{one['build']['peak_bytes'] / 2**30:.2f}", "build_peak_bytes", 2**30),
        row("open again, s", opening("open"), "open_seconds"),
        row("... not in the page cache", opening("open_uncached")),
        row("a worker's own memory, MB", memory("beyond_empty_bytes"), "worker_bytes", 1e6),
        row("... written to", memory("written_beyond_empty_bytes")),
    ]
    reused = "yes" if metr["open"]["reused"] and metr["open_uncached"]["reused"] else "**no**"
    return report.joined(
        f"# The index of {metr['source']['json_bytes'] / 1e9:.2f} GB of COCO JSON, read as {metr['build']['format']}",
        report.table(["", *both, "bar"], rows),
        f"The index is used again while the source is unchanged: {reused}. {report.facts(result)}.",
        "" if result["pycocotools"] else "pycocotools is not installed.",
    )


if __name__ == "__main__":
    sys.exit(main())
