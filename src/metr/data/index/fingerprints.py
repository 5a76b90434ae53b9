"""Which of the images whose size was measured an index asks for when it is opened."""

from itertools import islice
from pathlib import Path

from metr.data.formats.files import signature

# Images whose size was measured that an index watches for changes, at most. Opening it asks for each of them.
FINGERPRINTS = 20_000


class Fingerprints:
    """Size and time of change of images whose size was measured, because no annotation file tells it.

    No folder's time of change tells of an image that is changed in place. Of many images evenly spaced ones are
    fingerprints: a change of all is noticed, as when they are scaled, without asking for millions of files whenever the
    index is opened. A single image that is missed has its boxes fitted when it is read.
    """

    def __init__(self) -> None:
        self.signatures: dict[str, tuple[int, int]] = {}
        self._seen, self._step = 0, 1

    def add(self, path: str, root: Path) -> None:
        """Watches an image, unless enough near it are; `path` is relative to `root`."""
        if self._seen % self._step == 0:
            self.signatures[path] = signature(root / path)
            if len(self.signatures) > FINGERPRINTS:
                self.signatures = dict(islice(self.signatures.items(), 0, None, 2))
                self._step *= 2
        self._seen += 1
