"""A disk that can be filled."""

import os
from pathlib import Path


class SmallDisk:
    """A file system of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / "ballast"

    def leave(self, room: int) -> None:
        """Fills it up but for so many bytes."""
        self._ballast.unlink(missing_ok=True)
        status = os.statvfs(self.path)
        with self._ballast.open("wb") as file:
            file.write(b"\0" * max(0, status.f_bavail * status.f_frsize - room))

    def free(self) -> None:
        self._ballast.unlink()
