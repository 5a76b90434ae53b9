"""How fast does `metr detect` go through many images with Ray Data, beside the plain engine?

    python benchmarks/engines.py --detector checkpoints/metr-nano

Each engine runs as people start it, on few and on many of the same images (640 x 480 JPEGs, drawn here); engines take
turns, so that whatever else the machine does hits both. The difference of the two runs is the rate, without the start;
what is left of a run is the start: Python, the detector, ray's processes. The plain engine draws every image, as it
always does.

Results: `results/engines-cpu.json`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np

import report
import runner
from metr.config import Tree

ENGINES = {"plain": [], "ray": ["--engine", "ray", "--device", "cpu"]}
SCENE = (480, 640)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--detector", type=Path, default=Path("checkpoints/metr-nano"))
    parser.add_argument("--images", nargs=2, type=int, default=(100, 400), metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args(arguments)

    def work() -> bool:
        few, many = sorted(given.images)
        with tempfile.TemporaryDirectory() as name:
            lists = [draw_images(Path(name) / str(count), count) for count in (few, many)]
            rounds = [
                {
                    engine: [seconds(engine, given.detector, listed, Path(name)) for listed in lists]
                    for engine in ENGINES
                }
                for _ in range(given.rounds)
            ]
        about = runner.circumstances("engines", runner.commit(), "cpu")
        settings = {"detector": given.detector.name, "images": [few, many], "size": list(SCENE), "batch_size": 8}
        result = {**about, "load": os.getloadavg(), "settings": settings, **compared(rounds, few, many)}
        report.write_result(given.results / "engines-cpu", result)
        return True

    return runner.exit_status(work)


def draw_images(folder: Path, count: int) -> Path:
    """So many images of coloured rectangles; the file that lists them."""
    folder.mkdir()
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        image = np.full((*SCENE, 3), rng.integers(0, 255, 3), dtype=np.uint8)
        for _ in range(12):
            left, top, side = (int(value) for value in rng.integers(10, 400, 3))
            cv2.rectangle(image, (left, top), (left + side, top + side // 2), rng.integers(0, 255, 3).tolist(), -1)
        paths.append(folder / f"{number:06d}.jpg")
        cv2.imwrite(str(paths[-1]), image)
    listed = folder.with_suffix(".txt")
    listed.write_text("\n".join(map(str, paths)), encoding="utf-8")
    return listed


def seconds(engine: str, detector: Path, listed: Path, folder: Path) -> float:
    """How long the command takes, from its start to its end."""
    out = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-c", "from metr.cli.main import run; run()", "detect", str(detector.resolve())]
    command += ["--images-from", str(listed), "-o", out, "--threshold", "0.3", *ENGINES[engine]]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    start = time.perf_counter()
    subprocess.run(command, env=env, check=True, capture_output=True)
    return time.perf_counter() - start


def compared(rounds: Sequence[dict[str, list[float]]], few: int, many: int) -> Tree:
    """Rate and start of each engine, medians of the rounds; and ray's rate as a multiple of the plain engine's."""
    rates = {engine: [(many - few) / (one[engine][1] - one[engine][0]) for one in rounds] for engine in ENGINES}
    starts = {
        engine: [one[engine][0] - few / rate for one, rate in zip(rounds, rates[engine], strict=True)]
        for engine in ENGINES
    }
    ratio = median(ray / plain for ray, plain in zip(rates["ray"], rates["plain"], strict=True))
    found: Tree = {"seconds": list(rounds), "ratio": ratio}
    for engine in ENGINES:
        found[engine] = {"images_per_second": median(rates[engine]), "start_seconds": median(starts[engine])}
    return found


if __name__ == "__main__":
    sys.exit(main())
