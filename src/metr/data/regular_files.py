"""The files of people's folders: which are hidden, and how they are opened so that reading ends."""

import errno
import io
import stat
from pathlib import Path

# The size in bytes from which it is looked whether a file is sparse.
_SPARSE = 1 << 30


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, as what macOS puts beside files: `.DS_Store`, `._a.jpg`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file of a dataset to read its bytes.

    Raises:
        OSError: it cannot be opened, or is a pipe, a socket or a device, whose reading might never end; or it is a
            sparse file of gigabytes that holds next to nothing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # opening a directory tells its own error
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file", str(path))
    stored = 512 * getattr(status, "st_blocks", status.st_size)
    if status.st_size > _SPARSE and stored * 1000 < status.st_size:  # file systems that compress save less
        raise OSError(errno.EINVAL, f"{status.st_size:,} bytes of which nearly none are on the disk", str(path))
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """The bytes of a file of a dataset; errors are those of `open_regular`."""
    with open_regular(path) as file:
        return file.read()
