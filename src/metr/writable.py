"""Whether what a person names can be written: told before the work begins, which would be lost after it."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile

from metr.errors import CheckpointError
from metr.processes import in_main_process

__all__ = ["check_file_to_write", "check_folder_to_replace", "check_folder_to_write", "disk_error"]

_ROOM = "check that the disk has room and that the folder may be written"


def check_folder_to_write(folder: Path, files: tuple[str, ...] = ()) -> None:
    """Checks that files can be written into a folder, which need not be there yet. Leaves nothing behind.

    Only the main process writes, and is asked; in the others this does nothing.

    Args:
        folder: The folder, made later with its parents.
        files: Names in it that will be written over.

    Raises:
        CheckpointError: a file stands in the way, a folder does where a file is to be, or the disk refuses.
    """
    if not in_main_process():
        return
    _try(_nearest(folder), folder)
    for path in (folder / name for name in files):
        if path.is_dir():
            raise _folder_in_the_way(path)


def check_folder_to_replace(folder: Path) -> None:
    """Checks that a folder can be made, or moved away for a new one, in its parent; as `check_folder_to_write`.

    Raises:
        CheckpointError: a file stands in the way, or the disk refuses.
    """
    if in_main_process():
        _nearest(folder)
        _try(_nearest(folder.parent), folder)


def check_file_to_write(path: Path) -> None:
    """Checks that a file can be written, in a folder that need not be there yet; as `check_folder_to_write`.

    Raises:
        CheckpointError: a folder is at its place, a file in its folder's, or the disk refuses.
    """
    check_folder_to_write(path.parent, (path.name,))


def disk_error(error: OSError, where: Path) -> CheckpointError:
    """What the operating system says of writing to `where`: which file stands in the way, else its own words."""
    named = next((name for name in (error.filename2, error.filename) if isinstance(name, str)), None)
    path = where if named is None else Path(named)
    if isinstance(error, IsADirectoryError):
        return _folder_in_the_way(path)
    if isinstance(error, FileExistsError | NotADirectoryError):
        for place in (path, *path.parents):
            if os.path.lexists(place) and not place.is_dir():
                return _file_in_the_way(place, where)
    return CheckpointError(f"cannot be written: {error}", where=where, hint=_ROOM)


def _try(there: Path, wanted: Path) -> None:
    """Makes a file without a name in a folder that is there, for what is to be written in it."""
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        inside = "" if there == wanted else f" in {there}"
        what = f"cannot be written: {error.strerror or error}{inside}"
        raise CheckpointError(what, where=wanted, hint=_ROOM) from None


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there.

    Raises:
        CheckpointError: a file stands in the way, or the disk refuses to look.
    """
    for place in (folder, *folder.parents):
        try:
            if stat.S_ISDIR(place.stat().st_mode):
                return place
            raise _file_in_the_way(place, folder)
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise _file_in_the_way(place, folder) from None
        except OSError as error:
            raise disk_error(error, folder) from None
    return Path()


def _file_in_the_way(found: Path, wanted: Path) -> CheckpointError:
    kind = "a link that leads nowhere" if found.is_symlink() and not found.exists() else "a file"
    what = f"expected a folder, found {kind} of that name"
    what = what if found == wanted else f"cannot be written: {found} is {kind}, and no folder"
    return CheckpointError(what, where=wanted, hint="name another folder, or move what is there away")


def _folder_in_the_way(path: Path) -> CheckpointError:
    what = "expected a file, found a folder of that name"
    return CheckpointError(what, where=path, hint="name another place, or move the folder away")
