"""A command of METR in a forked process that dies where a plan says: before a change on disk, in one, or in a phase."""

import atexit
import builtins
import functools
import importlib
import io
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from metr.cli.main import run as run_command_line

PHASES = {
    "metr.training.train_request:open_joint": "reading the data",
    "metr.training.finetune_request:open_finetune_data": "reading the data",
    "metr.data.index.cache:_build": "index",
    "metr.data.containers.store:_unpack": "unpacking",
    "metr.text.cache:EmbeddingCache.put": "text embeddings",
    "metr.training.train:training_parts": "building the network",
    "metr.training.train:save_request": "request",
    "metr.training.finetune:save_request": "request",
    "metr.training.finetune:keep_before": "comparison",
    "metr.training.comparison:Comparison.write": "comparison",
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter.__init__": "starting workers",
    "metr.training.trainer:Trainer._load": "loading the state",
    "metr.training.logger:RunLogger.begin": "log",
    "metr.training.logger:RunLogger._write": "log",
    "metr.training.trainer:Trainer.train_step": "step",
    "metr.training.trainer:save_checkpoint": "checkpoint",
    "metr.training.trainer:save_state": "state",
    "metr.evaluation.runner:EvaluationRunner.report": "evaluation",
    "metr.evaluation.runner:write_report": "report",
    "metr.evaluation.report:draw_chart": "drawing",
    "metr.training.images:ValImages.draw": "drawing",
    "metr.training.trainer:draw_train_batch": "drawing",
    "metr.training.trainer:redraw_curves": "drawing",
    "metr.inference.detect_files:_draw": "drawing",
    "metr.inference.result_files:ResultFiles._write_coco": "detections",
    "metr.inference.result_files:ResultFiles.add": "detections",
    "metr.evaluation.results:store_calibration": "calibration",
}
"""The functions during which a run is in a phase; in none of them it is "between"."""
BETWEEN = "between"
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Victim = Literal["group", "main", "worker"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a command dies.

    `how` is "change": at the `number`-th change on disk in `phase`, before it or, of a write, after half of it;
    "moment": `delay` seconds after the phase begins for the `number`-th time; "time": `delay` seconds after the start,
    whatever it does then. `victim` is who is killed: the whole group, the main process or one data worker.
    """

    how: Literal["change", "moment", "time"]
    victim: Victim = "group"
    phase: str = BETWEEN
    number: int = 1
    delay: float = 0.0


@dataclass(kw_only=True)
class Record:
    """What a command did: by phase how often it began, its seconds in all, its changes on disk; what it imported."""

    entries: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    total: float = 0.0
    modules: list[str] = field(default_factory=list)


class Board:
    """A line of text that a process writes and the process that forked it reads, even after its death."""

    _SIZE = 512

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._SIZE)

    def show(self, phase: str, what: str = "") -> None:
        text = f"{phase}\n{what}".encode(errors="replace")[: self._SIZE - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    def read(self) -> tuple[str, str]:
        """The phase, and what was about to happen when the process died by plan; empty if it did not."""
        phase, _, what = self._memory[:].split(b"\0", 1)[0].decode(errors="replace").partition("\n")
        return phase or BETWEEN, what


class Doom:
    """Counts phases and changes on disk in this process, and kills where the plan says."""

    def __init__(self, board: Board, plan: Plan | None, watched: Path) -> None:
        self.board, self.plan, self.watched, self.process = board, plan, str(watched), os.getpid()
        self.started = time.perf_counter()
        self.entries: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._phases, self._modules = [BETWEEN], {*sys.modules}
        self._done = ""  # which worker was killed: this process goes on for a while

    def install(self) -> None:
        """Watches this process; forked ones are left alone."""
        for place, phase in PHASES.items():
            _wrap(place, functools.partial(self._phase, phase))
        sys.addaudithook(self._audit)
        fsync, opened = os.fsync, builtins.open

        def watched_fsync(handle: Any) -> None:
            self._change("fsync", "")
            fsync(handle)

        @functools.wraps(opened)
        def watched_open(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            handle = opened(file, mode, *more, **options)
            if self._is_watched(file) and any(letter in mode for letter in "wax+"):
                handle.write = functools.partial(self._write, handle, handle.write, str(file))
            return handle

        os.fsync = watched_fsync  # type: ignore[assignment]
        builtins.open = io.open = watched_open  # type: ignore[assignment]
        self.board.show(BETWEEN)

    def record(self) -> Record:
        return Record(
            entries=dict(self.entries),
            seconds=dict(self.seconds),
            changes=dict(self.changes),
            total=time.perf_counter() - self.started,
            modules=sorted({*sys.modules} - self._modules),
        )

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        if os.getpid() != self.process:
            yield
            return
        self._phases.append(phase)
        self.board.show(phase, self._done)
        self.entries[phase] += 1
        started, plan = time.perf_counter(), self.plan
        if plan is not None and (plan.how, plan.phase, plan.number) == ("moment", phase, self.entries[phase]):
            timer = threading.Timer(plan.delay, self._die, ["a moment"])
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started
            self._phases.pop()
            self.board.show(self._phases[-1], self._done)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if (arguments[2] or 0) & _WRITING and self._is_watched(arguments[0]):
                self._change("open", arguments[0])
        elif event in _CHANGES and (self._is_watched(arguments[0]) or -1 not in arguments):
            # relative to a folder that is open: rmtree
            self._change(event, arguments[0])

    def _write(self, handle: Any, write: Callable[[Any], Any], path: str, data: Any) -> Any:
        if os.getpid() == self.process and self._is_next():
            write(data[: len(data) // 2])
            handle.flush()
        self._change("write", path)
        return write(data)

    def _is_watched(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, str | os.PathLike) and str(path).startswith(self.watched)

    def _is_next(self) -> bool:
        """Whether the next change is the one to die at."""
        plan, phase = self.plan, self._phases[-1]
        return plan is not None and (plan.how, plan.phase, plan.number) == ("change", phase, self.changes[phase] + 1)

    def _change(self, event: str, path: object) -> None:
        if os.getpid() != self.process or threading.current_thread() is not threading.main_thread():
            return
        due = self._is_next()
        self.changes[self._phases[-1]] += 1
        if due:
            self._die(f"{event} {os.fspath(path)}".replace(self.watched, ""))

    def _die(self, what: str) -> None:
        victim = "group" if self.plan is None else self.plan.victim
        if victim == "worker":
            if workers := multiprocessing.active_children():
                self._done = f"{what}, in {self._phases[-1]}"
                self.board.show(self._phases[-1], self._done)
                os.kill(random.SystemRandom().choice(workers).pid, signal.SIGKILL)
            return
        self.board.show(self._phases[-1], what)
        if victim == "group":
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _wrap(place: str, phase: Callable[[], Any]) -> None:
    """Puts a function into a context."""
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments: Any, **options: Any) -> Any:
        with phase():
            return inner(*arguments, **options)

    setattr(owner, name, outer)


def fork(arguments: Sequence[object], place: Path, board: Board, plan: Plan | None, environment: dict[str, str]) -> int:
    """Starts `metr` with these arguments in a process and a group of its own; returns its number.

    What it says goes to `said.txt` in `place`; if it ends by itself, what it did to `record.json`.
    """
    board.show(BETWEEN)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code: object = 70
    try:
        os.setsid()
        said = os.open(place / "said.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(environment)
        tempfile.tempdir = None
        sys.argv = ["metr", *map(str, arguments)]
        doom = Doom(board, plan, place / "work")
        doom.install()
        code = 0
        try:
            run_command_line()
        except SystemExit as end:
            code = end.code
        (place / "record.json").write_text(json.dumps(asdict(doom.record())), encoding="utf-8")
        atexit._run_exitfuncs()
    except BaseException:
        code = 70
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
    raise AssertionError
