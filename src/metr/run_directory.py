"""Folders on disk: the layout of a run, and folders that are replaced whole or not at all."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from metr.errors import CheckpointError, MetrError
from metr.processes import in_main_process
from metr.writable import disk_error

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Files of every checkpoint."""
COUNTERS = "state.json"
"""The file that every saved state holds."""


@dataclass(frozen=True)
class RunDirectory:
    """The files and folders of one training run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Metrics: one JSON for each logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "last"

    @property
    def best(self) -> Path:
        """The checkpoint with the best evaluation."""
        return self.path / "best"

    @property
    def state(self) -> Path:
        """What a resumed run needs: weights, their average, optimizer, random numbers, counters."""
        return self.path / "state"

    @property
    def resumable(self) -> bool:
        """Whether a saved state is there to go on from."""
        return (existing_folder(self.state) / COUNTERS).is_file()

    @property
    def lock(self) -> Path:
        """The file that a process locks while it trains here."""
        return self.path / ".lock"

    @property
    def taken(self) -> bool:
        """Whether a process trains here now."""
        if not self.lock.is_file():
            return False
        try:
            with FileLock(self.lock, blocking=False):
                return False
        except Timeout:
            return True
        except (NotImplementedError, OSError):  # a file system without locks, or one that cannot be written
            return False

    def check_free(self) -> None:
        """Checks in the main process that nobody trains here, before anything is opened or told.

        Raises:
            MetrError: another process does.
        """
        if in_main_process() and self.taken:
            raise self.taken_error()

    def taken_error(self) -> MetrError:
        """The error that another process trains here."""
        what = "another process trains in this folder"
        return MetrError(what, where=self.path, hint="wait for it, or name another folder")

    def how_to_go_on(self, verb: str) -> str:
        """The command that resumes the run, in a line; `verb` is train or finetune."""
        return f"To go on:  metr {verb} --resume -o {shlex.quote(str(self.path))}"

    @property
    def curves(self) -> Path:
        """The image of losses and metrics over the steps."""
        return self.path / "curves.png"

    @property
    def log(self) -> Path:
        """What was logged and shown."""
        return self.path / "log.txt"

    @property
    def train_batch(self) -> Path:
        """The image of the first training batch."""
        return self.path / "train_batch.jpg"

    @property
    def val_images(self) -> Path:
        """The image of some val images with what the newest evaluation found in them."""
        return self.path / "val_images.jpg"

    @property
    def trackers(self) -> Path:
        """What trackers write, such as TensorBoard's event files."""
        return self.path / "trackers"

    def settle(self) -> None:
        """Finishes what a killed run was replacing: every checkpoint is at its place, and nothing beside it.

        Raises:
            CheckpointError: the disk refuses.
        """
        for folder in (self.state, self.last, self.best):
            settle_folder(folder)


@contextmanager
def explained_disk_errors(where: Path) -> Iterator[None]:
    """Turns the operating system's errors in the block into a `CheckpointError` about `where`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, where) from None


@contextmanager
def replaced_file(path: Path, *, flush: bool = False, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes the place of `path` when the block ends well.

    Until then `path` stays as it is: neither a kill nor a full disk leaves half a file there. The name ends as that of
    `path` does, so that libraries which go by endings write the same format.

    Args:
        path: The file to write; its folder is there.
        flush: Make sure that it survives a power failure, too.
        shared: Several processes may write it at a time; the last one to end has written it whole.

    Raises:
        CheckpointError: the disk refuses.
    """
    own = f".{uuid4().hex}" if shared else ""
    fresh = path.with_name(f".{path.stem}{own}.new{path.suffix}")
    with explained_disk_errors(path):
        try:
            yield fresh
            if flush:
                _flush_entry(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        if flush:
            _flush_entry(path.parent)


@contextmanager
def replaced_folder(folder: Path, marker: str) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block ends well.

    Until then `folder` stays as it is; afterwards it is complete and flushed to disk. A crash at any moment leaves the
    old one or the new one (between two renames the old one lies beside its place; `existing_folder` finds it there).

    Args:
        folder: The place to fill; its parents are made.
        marker: A file that every folder of this kind holds: a folder without it is not replaced.

    Raises:
        CheckpointError: `folder` holds something else, or the disk refuses.
    """
    fresh, previous = _sibling(folder, "new"), _previous(folder)
    with explained_disk_errors(folder):
        if previous.exists() and not folder.exists():
            previous.replace(folder)
        refuse_other_content(folder, marker)
        settle_folder(folder)
        fresh.mkdir(parents=True)
        try:
            yield fresh
            _permit(fresh)
            _flush(fresh)
            if folder.exists():
                folder.replace(previous)
            fresh.replace(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _flush_entry(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)


def settle_folder(folder: Path) -> None:
    """Finishes what a crash left of `replaced_folder`: the complete version is at its place, and nothing beside it.

    Raises:
        CheckpointError: the disk refuses.
    """
    fresh, previous = _sibling(folder, "new"), _previous(folder)
    with explained_disk_errors(folder):
        if previous.exists() and not folder.exists():
            previous.replace(folder)
        for leftover in (fresh, previous):
            if leftover.exists():
                shutil.rmtree(leftover)


def existing_folder(folder: Path) -> Path:
    """`folder`, or the complete old version of it that a crash between two renames left beside it."""
    if not folder.name:  # "." and "/", which nothing replaces
        return folder
    previous = _previous(folder)
    return previous if previous.is_dir() and not folder.exists() else folder


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: the folder itself, or the best, else the last, of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    run = RunDirectory(path)
    for folder in (existing_folder(path), existing_folder(run.best), existing_folder(run.last)):
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists():
        raise CheckpointError("no such checkpoint", where=path, hint="check the path")
    what = f"expected a checkpoint ({CONFIG} and {WEIGHTS}) or a run folder that holds one"
    raise CheckpointError(what, where=path, hint="name the folder itself, such as RUN/best")


def refuse_other_content(folder: Path, marker: str) -> None:
    """Keeps a mistyped path from deleting somebody's files.

    Args:
        folder: The place of a `replaced_folder`.
        marker: A file that every folder of this kind holds.

    Raises:
        CheckpointError: `folder` is a file, a folder that holds something else, or the current one.
    """
    _need_name(folder)
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / marker).is_file()):
        return
    if folder.exists():
        what = f"exists and is not a folder with {marker}, so it is not overwritten"
        raise CheckpointError(what, where=folder, hint="name another folder, or move this one away")


def _need_name(folder: Path) -> None:
    """Refuses the current folder and the root, which nothing can take the place of.

    Raises:
        CheckpointError: it is one of the two.
    """
    if not folder.name:
        what = "is the current folder or the root, whose place nothing can take"
        raise CheckpointError(what, where=folder, hint="name a folder in it")


def _previous(folder: Path) -> Path:
    return _sibling(folder, "previous")


def _sibling(folder: Path, suffix: str) -> Path:
    _need_name(folder)
    return folder.with_name(f".{folder.name}.{suffix}")


def _permit(folder: Path) -> None:
    """Gives files the permissions that new ones have here (umask): some libraries let their owner alone read theirs."""
    sample = folder / ".sample"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _flush(folder: Path) -> None:
    """Makes sure that files and their names reach the disk before the folder is renamed."""
    for path in folder.rglob("*"):
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and flushes only handles that may write
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
