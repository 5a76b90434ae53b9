"""Where the text files of YOLO's images lie."""

import posixpath
from collections.abc import Iterator
from pathlib import Path

from metr.data.formats.file_per_image import ANNOTATION_WORDS, IMAGE_WORDS, called_like, counterparts
from metr.data.formats.files import Files, files_in, fold, folders_within, is_image

# Text files that hold no labels, by their names without suffix.
_NO_LABELS = frozenset(
    {"classes", "labels", "names", "readme", "notes", "train", "val", "valid", "test", "predefined_classes"}
)
_DEPTH = 3


class LabelFiles:
    """Finds the text file of each image: in a folder called like labels beside one called like images, or beside it.

    Of several folders that may be meant, the likeliest is taken that has a text file of an image.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._chosen: dict[str, str | None] = {}
        self._texts: dict[str, dict[str, str]] = {}

    def of(self, image: str) -> str | None:
        """The text file of an image; None where it has none."""
        folder, name = posixpath.split(image)
        stem = posixpath.splitext(name)[0]
        if folder not in self._chosen:
            self._chosen[folder] = self._choose(folder)
        for place in (self._chosen[folder], folder):
            if place is None:
                continue
            texts = self._texts_in(place)
            found = texts.get(stem) or texts.get(name) or texts.get(fold(stem))
            if found is not None:
                return posixpath.join(place, found)
        return None

    def places(self, folder: str) -> list[str]:
        """Where the text files of the images of a folder may lie, likeliest first; the folders that are there."""
        twins = [
            posixpath.join(place, *rest)
            for place, rest in counterparts(self.files, folder, IMAGE_WORDS, ANNOTATION_WORDS)
        ]
        parts = folder.split("/") if folder else []
        for index in range(len(parts), -1, -1):
            above = "/".join(parts[:index])
            names = called_like(ANNOTATION_WORDS, self.files.listing(above))
            twins += [posixpath.join(above, name, *parts[index:]) for name in names]
        return [place for place in dict.fromkeys(twins) if place != folder and self.files.listing(place)]

    def without_image(self) -> Iterator[str]:
        """The text files, in folders that were chosen for one folder of images alone, whose image is not there."""
        for folder, place in self._chosen.items():
            if place is None or list(self._chosen.values()).count(place) > 1:
                continue
            images = {fold(posixpath.splitext(name)[0]) for name in self.files.listing(folder) if is_image(name)}
            names = {fold(name) for name in self.files.listing(folder)}
            for text in sorted(self.files.listing(place)):
                stem, suffix = posixpath.splitext(text)
                known = fold(stem) in images or fold(stem) in names or fold(stem) in _NO_LABELS
                if suffix.lower() == ".txt" and not known:
                    yield posixpath.join(place, text)

    def _choose(self, folder: str) -> str | None:
        stems = {fold(posixpath.splitext(name)[0]) for name in self.files.listing(folder) if is_image(name)}
        return next((place for place in self.places(folder) if self._fits(place, stems)), None)

    def _fits(self, place: str, stems: set[str]) -> bool:
        return any(fold(posixpath.splitext(stem)[0]) in stems or fold(stem) in stems for stem in self._texts_in(place))

    def _texts_in(self, place: str) -> dict[str, str]:
        """The text files of a folder by their names without suffix, as they are and without regard to case."""
        if place not in self._texts:
            texts = [posixpath.splitext(name) for name in sorted(self.files.listing(place), reverse=True)]
            own = {stem: stem + suffix for stem, suffix in texts if suffix.lower() == ".txt"}
            self._texts[place] = {fold(stem): name for stem, name in own.items()} | own
        return self._texts[place]


def folders_with_texts(root: Path) -> list[Path]:
    """The folders of a dataset that hold text files which may be labels."""
    return [
        folder
        for folder in folders_within(root, _DEPTH)
        if any(fold(file.stem) not in _NO_LABELS for file in files_in(folder, ".txt"))
    ]
