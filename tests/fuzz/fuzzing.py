"""Damages what METR reads, in ways that a seed decides, and checks what becomes of it.

Four things must hold for every case: no error but METR's own, an answer within `SECONDS`, at most `MEGABYTES` of
memory, and no box on an image that it does not belong to. `python tests/fuzz/fuzzing.py --help` says how to run many.
"""

import argparse
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "data")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from line_trees import LINE_LAYOUTS  # noqa: E402
from reader_trees import LAYOUTS, made_up  # noqa: E402
from test_readers_damaged import damaged  # noqa: E402

from metr.conversion.import_ import read_published  # noqa: E402
from metr.data.datasets_file import DatasetConfig, open_dataset, parse_data_arguments  # noqa: E402
from metr.data.images import read_image  # noqa: E402
from metr.errors import MetrError  # noqa: E402
from metr.inference.request import names_to_find  # noqa: E402
from metr.model import METR  # noqa: E402
from metr.text.language_model import LanguageModel, LanguageModelSource  # noqa: E402
from metr.training.config import load_recipe  # noqa: E402
from odd_images import READABLE, UNREADABLE, write_all  # noqa: E402

SECONDS, MEGABYTES = 20, 2000
EVERY = 500
"""After so many cases of a kind, a long run says how far it is."""
KINDS = ("annotations", "identities", "images", "configurations", "checkpoints")
# values that no made dataset has
_ABSENT = ("987654321", "-7", "absent")
_IDENTITY = re.compile(
    rb'("(?:image_id|category_id|id|file_name|filename|path|image_path|imagePath)"\s*:\s*)("[^"]*"|-?\d+)'
)


@dataclass
class Report:
    """How many cases were tried, how they ended, and what went wrong."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_case: str = ""

    def __str__(self) -> str:
        lines = [f"{kind}: {count:,} tried, {self.refused[kind]:,} refused" for kind, count in self.tried.items()]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        slowest = f"slowest {self.slowest:.1f} s ({self.slowest_case})"
        lines += [f"{slowest}, memory at most {peak:,} MB, {len(self.failures)} failures"]
        return "\n".join([*lines, *self.failures])


class TooSlowError(Exception):
    """A case took longer than `SECONDS`."""


class WrongBoxError(Exception):
    """A box is on an image that it does not belong to."""


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """Cases of all kinds; the same seed gives the same cases.

    Args:
        home: A folder to work in.
        seed: Decides everything.
    """

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed, self.report = home, seed, Report()
        self._truths: dict[str, dict[str, set[tuple[object, ...]]]] = {}

    def run(self, kind: str, cases: int, until: float | None = None) -> None:
        """Tries so many cases of a kind, or those that fit before `until` (of `time.monotonic`)."""
        for number in range(cases):
            if until is not None and time.monotonic() > until:
                return
            self._case(kind, number)
            if (number + 1) % EVERY == 0:
                _say(self.report)

    def _case(self, kind: str, number: int) -> None:
        name = f"{kind} {number} of seed {self.seed}"
        chance = np.random.default_rng([self.seed, KINDS.index(kind), number])
        self.report.tried[kind] += 1
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            with _limited(SECONDS):
                getattr(self, f"_{kind}")(chance)
        except MetrError as error:
            self.report.refused[kind] += 1
            if len(str(error)) > 10_000:
                self.report.failures.append(f"{name}: a message of {len(str(error)):,} characters")
        except Exception:
            self.report.failures.append(f"{name}: {traceback.format_exc()[-1500:]}")
        if (taken := time.monotonic() - began) > self.report.slowest:
            self.report.slowest, self.report.slowest_case = taken, name
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > MEGABYTES:
            self.report.failures.append(f"{name}: {grown:,} MB")

    # datasets

    def _made(self, layout: str) -> Path:
        root = self.home / "trees" / layout.replace(" ", "-")
        if not root.exists():
            (LAYOUTS | LINE_LAYOUTS)[layout][1](root, made_up())
        return root

    def _content(self, root: Path) -> dict[str, set[tuple[object, ...]]]:
        cache = self.home / "cache"
        try:
            source = open_dataset(DatasetConfig(name="made", path=root), cache)
            found: dict[str, set[tuple[object, ...]]] = {}
            for record in (record for split in source.splits.values() for record in split):
                boxes = found.setdefault(record.path.relative_to(root).as_posix(), set())
                for box, label in zip(record.boxes.round(1).tolist(), record.labels.tolist(), strict=True):
                    boxes.add((source.categories[label], *box))
            return found
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def _annotation_file(self, chance: np.random.Generator) -> tuple[str, Path, Path]:
        layouts = sorted(LAYOUTS | LINE_LAYOUTS)
        layout = layouts[int(chance.integers(len(layouts)))]
        root = self._made(layout)
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() != ".jpg")
        return layout, root, files[int(chance.integers(len(files)))]

    def _annotations(self, chance: np.random.Generator) -> None:
        """Bytes of an annotation file are damaged, in one place or in several."""
        _, root, path = self._annotation_file(chance)
        whole = path.read_bytes()
        data = whole
        for _ in range(int(chance.integers(1, 4))):
            data = damaged(data, chance)
        path.write_bytes(data)
        try:
            self._content(root)
        finally:
            path.write_bytes(whole)

    def _identities(self, chance: np.random.Generator) -> None:
        """An id or a path becomes one that the file does not have: boxes may be lost, and never move."""
        layout, root, path = self._annotation_file(chance)
        if layout not in self._truths:
            self._truths[layout] = self._content(root)
        truth, whole = self._truths[layout], path.read_bytes()
        absent = _ABSENT[int(chance.integers(len(_ABSENT)))].encode()
        places = [match.span(2) for match in _IDENTITY.finditer(whole)]
        for stem in {Path(image).stem.encode() for image in truth}:
            places += [match.span() for match in re.finditer(re.escape(stem), whole)]
        if not places:
            return
        start, stop = sorted(places)[int(chance.integers(len(places)))]
        new = b'"absent"' if whole[start : start + 1] == b'"' else absent
        path.write_bytes(whole[:start] + new + whole[stop:])
        try:
            found = self._content(root)
        finally:
            path.write_bytes(whole)
        for image, boxes in found.items():
            known = {box[1:] for box in truth.get(image, set())}
            if strangers := {box[1:] for box in boxes} - known:
                raise WrongBoxError(f"{path.relative_to(root)} byte {start}: {image} has {strangers}")

    # images

    def _images(self, chance: np.random.Generator) -> None:
        folder = self.home / "images"
        if not folder.exists():
            write_all(folder, READABLE | UNREADABLE)
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size < 1 << 20)
        source = files[int(chance.integers(len(files)))]
        data = bytearray(source.read_bytes())
        for _ in range(int(chance.integers(1, 8))):
            if data and chance.random() < 0.7:  # most damage to headers, which declare sizes
                place = int(chance.integers(min(len(data), 64 if chance.random() < 0.5 else len(data))))
                data[place] = int(chance.integers(256))
            else:
                data = bytearray(damaged(bytes(data), chance))
        path = self.home / f"damaged{source.suffix}"
        path.write_bytes(data)
        pixels = read_image(path)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3

    # configurations and checkpoints

    def _configurations(self, chance: np.random.Generator) -> None:
        recipes = sorted((Path(sys.modules["metr"].__file__ or "").parent / "recipes").glob("*.yaml"))
        text = recipes[int(chance.integers(len(recipes)))].read_bytes()
        listing = b"datasets:\n  - {path: a, name: x, weight: 2.5, prompts: {a: b}, renames: {b: c}}\n  - b=c\n"
        names = b"RBC: [red blood cell, erythrocyte]\nshark: big fish\n"
        cases: list[tuple[bytes, Callable[[Path], object]]] = [
            (text, lambda file: load_recipe("nano", file)),
            (listing, lambda file: parse_data_arguments([str(file)])),
            (names, lambda file: names_to_find(None, file)),
        ]
        data, read = cases[int(chance.integers(len(cases)))]
        for _ in range(int(chance.integers(1, 4))):
            data = damaged(data, chance)
        path = self.home / "damaged.yaml"
        path.write_bytes(data)
        read(path)

    def _checkpoints(self, chance: np.random.Generator) -> None:
        sources = self._sources()
        whole, read = sources[int(chance.integers(len(sources)))]
        files = sorted(path for path in whole.rglob("*") if path.is_file())
        path = files[int(chance.integers(len(files)))]
        place, data = self.home / "damaged", path.read_bytes()
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        as_json = path.suffix == ".json" and chance.random() < 0.6
        data = _other_value(data, chance) if as_json else damaged(data, chance)
        (place / path.relative_to(whole)).write_bytes(data)
        read(place)

    def _sources(self) -> list[tuple[Path, Callable[[Path], object]]]:
        from metr.checkpoint import save_checkpoint
        from small_runs import make_parts

        from tiny import write_text_model

        checkpoint, text, weights = (self.home / "whole" / name for name in ("checkpoint", "text", "weights"))
        if not text.exists():
            parts = make_parts(self.home / "parts")
            import dataclasses

            state = parts.network.state_dict()
            save_checkpoint(checkpoint, dataclasses.replace(parts.checkpoint, weights=state))
            weights.mkdir()
            torch.save(
                {"model": {"a.weight": torch.zeros(4, 4)}, "args": argparse.Namespace(a=1)}, weights / "dino.pth"
            )
            write_text_model(text)

        def read_text(folder: Path) -> None:
            LanguageModel(LanguageModelSource.find(str(folder), None, "auto")).encode(["a cup", "fish"])

        return [
            (checkpoint, lambda folder: METR.from_pretrained(folder, device="cpu")),
            (text, read_text),
            (weights, lambda folder: read_published(next(folder.glob("*.pth")))),
        ]


def _other_value(data: bytes, chance: np.random.Generator) -> bytes:
    """A JSON file with another value in one place."""
    tree = json.loads(data)
    odd = [None, -1, 0, 10**9, 10**30, 1e308, "", "x", "\0", [], {}, True, [[[]]], {"a": 1}, -0.5, "../../x", ["a", 1]]
    node, keys = tree, []
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(chance.integers(len(keys)))]
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.2:
            node[key] = odd[int(chance.integers(len(odd)))]
            break
        node = node[key]
    return json.dumps(tree).encode()


def _say(report: Report) -> None:
    sys.stdout.write(f"{report}\n")
    sys.stdout.flush()


def main() -> int:
    """The command line; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as home:
        fuzzer = Fuzzer(Path(home), arguments.seed)
        until = time.monotonic() + 60 * arguments.minutes
        for kind in KINDS:
            fuzzer.run(kind, getattr(arguments, kind), until)
            _say(fuzzer.report)
    return 1 if fuzzer.report.failures else 0


if __name__ == "__main__":
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.exit(main())
