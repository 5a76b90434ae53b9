"""Drawn blood smears, which the shipped detector takes for real ones: cells at places that a test decides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_PAPER = (214, 208, 214)
_RED = ((1.0, (198, 150, 158)), (0.93, (205, 166, 172)), (0.6, (214, 182, 186)), (0.4, (222, 196, 200)))
_NUCLEUS = (120, 80, 190)
# of a nucleus: to the right, down, and the radius, as parts of the cell's radius
_LOBES = ((-0.35, -0.2, 0.5), (0.3, -0.25, 0.5), (0.05, 0.35, 0.5), (0.0, 0.0, 0.4))


@dataclass(frozen=True)
class Cell:
    """A cell around (x, y) with a radius, in pixels; white ones have a dark nucleus of three lobes."""

    x: float
    y: float
    radius: float
    white: bool = False

    @property
    def name(self) -> str:
        return "WBC" if self.white else "RBC"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """xyxy in pixels."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


def scattered(width: int, height: int, count: int, seed: int = 0) -> list[Cell]:
    """One white cell and red ones that do not overlap, each whole in the image."""
    chance = np.random.default_rng(seed)
    cells = [Cell(width * 0.6, height * 0.55, 75, white=True)]
    for _ in range(10_000):
        if len(cells) == count:
            break
        x, y, radius = chance.uniform(50, width - 50), chance.uniform(50, height - 50), chance.uniform(42, 49)
        if all(np.hypot(x - one.x, y - one.y) > radius + one.radius for one in cells):
            cells.append(Cell(x, y, radius))
    return cells


def _spots() -> list[tuple[float, float, float]]:
    """Lighter and (with a negative radius) darker spots of a nucleus: without texture it is taken for no cell."""
    chance = np.random.default_rng(5)
    spots = []
    for _ in range(14):
        angle, distance = chance.uniform(0, 2 * np.pi), chance.uniform(0, 0.6)
        spots.append((distance * np.cos(angle), distance * np.sin(angle), chance.uniform(0.06, 0.16)))
    return [(across, down, spot * chance.choice([-1, 1])) for across, down, spot in spots]


def drawn(cells: Sequence[Cell], width: int, height: int, seed: int = 0) -> Image.Image:
    """The image of cells, with a little noise."""
    image = Image.new("RGB", (2 * width, 2 * height), _PAPER)
    canvas = ImageDraw.Draw(image)
    for cell in cells:
        x, y, radius = 2 * cell.x, 2 * cell.y, 2 * cell.radius
        for part, colour in ((1.0, (205, 175, 205)),) if cell.white else _RED:
            canvas.ellipse((x - part * radius, y - part * radius, x + part * radius, y + part * radius), fill=colour)
        for across, down, lobe in _LOBES if cell.white else ():
            a, b, c = x + across * radius, y + down * radius, lobe * radius
            canvas.ellipse((a - c, b - c, a + c, b + c), fill=_NUCLEUS)
        for across, down, spot in _spots() if cell.white else ():
            a, b, c = x + across * radius, y + down * radius, abs(spot) * radius
            lighter = 15 if spot > 0 else -15
            canvas.ellipse((a - c, b - c, a + c, b + c), fill=tuple(value + lighter for value in _NUCLEUS))
    image = image.resize((width, height), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(1.2))
    noise = np.random.default_rng(seed).normal(0, 3, (height, width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
