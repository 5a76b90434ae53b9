"""Images of three fields with objects whose visible extent is known exactly.

Everything is drawn at twice the size and shrunk. An image is a function of its field and the random generator alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from metr.demo import objects
from metr.demo.canvas import Canvas, Colour, Ground, Pose, Sprite, blades, daylight, grass, hsv, softened, water, wood

OVERSAMPLING = 2
FEWEST, MOST = 3, 12
_COUNT_SHARES = (0.09, 0.14, 0.17, 0.16, 0.14, 0.11, 0.08, 0.05, 0.03, 0.03)  # of images with 3, 4, ... 12 objects
_LEAST_VISIBLE = 0.4
_TOUCHING = 0.23  # how often an object is put against another one

Painter = Callable[[Canvas, np.random.Generator], None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one category appears.

    `size` multiplies the side, `turn` is the largest angle in degrees, `layer` says what lies on what, `height` how far
    the shadow falls (share of the side), `opacity` how much of the ground does not shine through.
    """

    paint: Painter
    size: float = 1.0
    turn: float = 180.0
    layer: float = 0.0
    height: float = 0.06
    bend: float = 0.0
    opacity: float = 1.0


KINDS: dict[str, Kind] = {
    "fish": Kind(paint=objects.fish, size=1.15, layer=0.0, height=0.12, bend=0.3, opacity=0.9),
    "turtle": Kind(paint=objects.turtle, size=1.05, layer=0.7, height=0.1),
    "frog": Kind(paint=objects.frog, size=1.0, layer=1.0),
    "butterfly": Kind(paint=objects.butterfly, size=0.95, layer=3.0, height=0.16),
    "snail": Kind(paint=objects.snail, size=1.0, turn=20.0, layer=1.0),
    "leaf": Kind(paint=objects.leaf, size=1.0, layer=1.0, height=0.04, bend=0.15),
    "mushroom": Kind(paint=objects.mushroom, size=1.0, turn=20.0, layer=1.5, height=0.1),
    "cup": Kind(paint=objects.cup, size=1.0, layer=1.0, height=0.1),
    "scissors": Kind(paint=objects.scissors, size=1.2, layer=1.0, height=0.05),
    "book": Kind(paint=objects.book, size=1.1, layer=0.0, height=0.08),
}
CLUTTER: dict[str, Kind] = {
    "lily pad": Kind(paint=objects.lily_pad, size=1.2, height=0.06),
    "stone": Kind(paint=objects.stone, size=0.4),
    "daisy": Kind(paint=objects.daisy, size=0.3),
    "twig": Kind(paint=objects.twig, size=1.2, height=0.04),
    "sheet": Kind(paint=objects.sheet, size=1.9, height=0.02),
    "note": Kind(paint=objects.note, size=0.7, height=0.03),
    "pencil": Kind(paint=objects.pencil, size=1.4, height=0.04),
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One dataset's world: what its owner labels, what else is there, and where it lies. `size` is (width, height)."""

    name: str
    size: tuple[int, int]
    ground: Ground
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    clutter: tuple[str, ...]
    dapple: float = 0.0
    reeds: int = 0


FIELDS: tuple[Field, ...] = (
    Field(
        name="pond",
        size=(384, 288),
        ground=water,
        labelled=("fish", "frog", "leaf", "turtle"),
        unlabelled=("butterfly",),
        clutter=("lily pad", "lily pad", "stone", "twig"),
        dapple=0.2,
        reeds=10,
    ),
    Field(
        name="desk",
        size=(352, 264),
        ground=wood,
        labelled=("book", "cup", "scissors"),
        unlabelled=("leaf",),
        clutter=("sheet", "note", "pencil", "pencil"),
    ),
    Field(
        name="meadow",
        size=(320, 240),
        ground=grass,
        labelled=("butterfly", "leaf", "mushroom", "snail"),
        unlabelled=("frog", "cup"),
        clutter=("stone", "daisy", "daisy", "daisy", "twig"),
        dapple=0.35,
        reeds=26,
    ),
)


@dataclass(frozen=True, kw_only=True)
class DrawnObject:
    """One object of an image: `box` is the visible extent, xyxy in pixels; `labelled` says if its dataset names it."""

    name: str
    box: tuple[float, float, float, float]
    labelled: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image (RGB) and everything of interest in it."""

    image: UInt8[np.ndarray, "h w 3"]
    objects: tuple[DrawnObject, ...]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    sprite: Sprite
    kind: Kind
    left: int
    top: int
    labelled: bool = True

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.sprite.width, self.top + self.sprite.height


def draw_sprite(name: str, rng: np.random.Generator, side: float) -> Sprite:
    """One object, drawn so that its larger extent is roughly `side` pixels."""
    kind = KINDS.get(name) or CLUTTER[name]
    pose = Pose(
        scale=side * kind.size / 2,
        angle=float(rng.uniform(-kind.turn, kind.turn)),
        aspect=float(rng.uniform(0.85, 1.12)),
        bend=float(rng.uniform(-kind.bend, kind.bend)),
        mirrored=bool(rng.random() < 0.5),
    )
    canvas = Canvas(pose)
    kind.paint(canvas, rng)
    return canvas.finish(name, rng)


def draw_scene(field: Field, rng: np.random.Generator, guests: Sequence[str] = ()) -> Scene:
    """An image of `field`; objects called `guests` (of any field) are added to it, unlabelled."""
    width, height = (OVERSAMPLING * side for side in field.size)
    placed: list[_Placed] = []
    while sum(item.labelled for item in placed) < FEWEST:
        placed = _visible(_arrange(field, rng, guests), height, width)
    canvas = field.ground(rng, height, width)
    sun = rng.uniform(0, 2 * np.pi)
    for item in _scatter(field, rng, height, width) + placed:
        _paste(canvas, item, sun)
    owner = _owners(placed, height, width)
    _draw_reeds(canvas, owner, field.reeds, rng)
    objects = tuple(
        DrawnObject(name=item.sprite.name, box=box, labelled=item.labelled)
        for index, item in enumerate(placed)
        if (box := _extent(owner, index, item)) is not None
    )
    return Scene(image=_photographed(canvas, field, rng), objects=objects)


def _arrange(field: Field, rng: np.random.Generator, guests: Sequence[str]) -> list[_Placed]:
    """Objects with their places, those that lie on others last."""
    count = int(rng.choice(np.arange(FEWEST, MOST + 1), p=_COUNT_SHARES))
    names = list(rng.choice(field.labelled, count))
    unlabelled = list(rng.choice(field.unlabelled, int(rng.choice(3, p=(0.4, 0.4, 0.2))))) + list(guests)
    crowding = min(1.0, (8 / (count + len(unlabelled))) ** 0.5)
    image_side = OVERSAMPLING * float(np.sqrt(field.size[0] * field.size[1]))
    placed: list[_Placed] = []
    for index, name in enumerate(names + unlabelled):
        side = image_side * crowding * float(np.exp(rng.uniform(np.log(0.15), np.log(0.27))))
        sprite = draw_sprite(str(name), rng, side)
        place = _free_place(sprite, placed, field, rng)
        if place is not None:
            item = _Placed(sprite=sprite, kind=KINDS[str(name)], left=place[0], top=place[1], labelled=index < count)
            placed.append(item)
    return sorted(placed, key=lambda item: item.kind.layer + rng.normal(0, 0.4))


def _free_place(
    sprite: Sprite, placed: list[_Placed], field: Field, rng: np.random.Generator
) -> tuple[int, int] | None:
    """Top left corner for a sprite: clear of all others, or now and then against one of them; None if there is none."""
    width, height = (OVERSAMPLING * side for side in field.size)
    spill = 0.25 if rng.random() < 0.1 else 0.0
    low = np.array([-spill * sprite.width, -spill * sprite.height])
    high = np.array([width, height]) - np.array([sprite.width, sprite.height]) - low
    corners = rng.uniform(low, np.maximum(high, low + 1), (120, 2)).round().astype(int)
    if not placed:
        return int(corners[0, 0]), int(corners[0, 1])
    shared = _shared(corners, sprite, np.array([item.box for item in placed]))
    touching = rng.random() < _TOUCHING
    fits = (shared > 0.08) & (shared < 0.45) if touching else shared == 0
    chosen = np.flatnonzero(fits)
    return (int(corners[chosen[0], 0]), int(corners[chosen[0], 1])) if len(chosen) else None


def _shared(corners: Int[np.ndarray, "n 2"], sprite: Sprite, boxes: Int[np.ndarray, "m 4"]) -> Float[np.ndarray, "n"]:
    """The largest share of either box that a sprite at each corner has in common with any box."""
    size = np.array([sprite.width, sprite.height])
    low = np.maximum(corners[:, None], boxes[None, :, :2])
    high = np.minimum(corners[:, None] + size, boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    smaller = np.minimum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), size.prod())
    largest: Float[np.ndarray, "n"] = (common / smaller).max(axis=1)
    return largest


def _owners(placed: Sequence[_Placed], height: int, width: int) -> Int[np.ndarray, "h w"]:
    """Which object is seen at each pixel: its index, -1 for none."""
    owner = np.full((height, width), -1, np.int16)
    for index, item in enumerate(placed):
        inside, part = _overlap(item, height, width)
        owner[inside][item.sprite.alpha[part] > 127] = index
    return owner


def _visible(placed: list[_Placed], height: int, width: int) -> list[_Placed]:
    """The objects that are left when those hidden for the most part are taken away."""
    while placed:
        seen = np.bincount(_owners(placed, height, width).ravel() + 1, minlength=len(placed) + 1)[1:]
        full = np.array([(item.sprite.alpha > 127).sum() for item in placed])
        kept = [item for item, share in zip(placed, seen / full, strict=True) if share >= _LEAST_VISIBLE]
        if len(kept) == len(placed):
            break
        placed = kept
    return placed


def _extent(owner: Int[np.ndarray, "h w"], index: int, item: _Placed) -> tuple[float, float, float, float] | None:
    """The box of what is seen of an object, in pixels of the finished image."""
    inside, _ = _overlap(item, *owner.shape)
    mine = owner[inside] == index
    rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
    if not len(rows):
        return None
    left, top = inside[1].start, inside[0].start
    edges = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    x0, y0, x1, y1 = (float(edge / OVERSAMPLING) for edge in edges)
    return x0, y0, x1, y1


def _overlap(item: _Placed, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a sprite and the canvas meet: slices of the canvas and of the sprite."""
    left, top, right, bottom = item.box
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = max(x0, min(width, right)), max(y0, min(height, bottom))
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _scatter(field: Field, rng: np.random.Generator, height: int, width: int) -> list[_Placed]:
    """Clutter, anywhere."""
    if not field.clutter:
        return []
    placed = []
    for name in rng.choice(field.clutter, int(rng.integers(3, 9))):
        sprite = draw_sprite(str(name), rng, 0.2 * width * float(rng.uniform(0.6, 1.25)))
        left, top = rng.uniform(-0.2, 1, 2) * (width, height) - 0.1 * sprite.width
        placed.append(_Placed(sprite=sprite, kind=CLUTTER[str(name)], left=int(left), top=int(top), labelled=False))
    return [item for item in placed if item.left < width and item.top < height and min(item.box[2:]) > 0]


def _paste(canvas: UInt8[np.ndarray, "h w 3"], item: _Placed, sun: float) -> None:
    """Draws the object's shadow, if it stands above the ground, and then the object."""
    if item.kind.height > 0:
        _cast_shadow(canvas, item, sun)
    _blend(canvas, item, item.kind.opacity)


def _cast_shadow(canvas: UInt8[np.ndarray, "h w 3"], item: _Placed, sun: float) -> None:
    reach = item.kind.height * min(item.sprite.width, item.sprite.height)
    soft = max(1.0, reach * 0.6)
    margin = int(np.ceil(3 * soft))
    dark = softened(item.sprite.alpha, soft, margin)
    shadow = Sprite(name="shadow", colour=np.zeros((*dark.shape, 3), np.uint8), alpha=dark)
    left, top = item.left - margin + round(reach * np.cos(sun)), item.top - margin + round(reach * np.sin(sun))
    _blend(canvas, _Placed(sprite=shadow, kind=item.kind, left=left, top=top), 0.45)


def _blend(canvas: UInt8[np.ndarray, "h w 3"], item: _Placed, opacity: float) -> None:
    inside, part = _overlap(item, *canvas.shape[:2])
    left_over = cv2.convertScaleAbs(item.sprite.alpha[part], alpha=-opacity, beta=255)
    ground = cv2.multiply(canvas[inside], cv2.merge([left_over] * 3), scale=1 / 255)
    canvas[inside] = cv2.addWeighted(item.sprite.colour[part], opacity, ground, 1.0, 0.0)


def _draw_reeds(
    canvas: UInt8[np.ndarray, "h w 3"], owner: Int[np.ndarray, "h w"], count: int, rng: np.random.Generator
) -> None:
    """Blades in front of everything; what they hide is no longer seen."""
    tone: Colour = hsv(rng, (60, 120), (0.35, 0.75), (0.35, 0.8))
    lines = blades(rng, *canvas.shape[:2], count=count, slant=float(rng.uniform(-0.5, 0.5)))
    cv2.polylines(canvas, lines, False, tone, 3, cv2.LINE_AA)
    cv2.polylines(owner, lines, False, -1, 3)


def _photographed(
    canvas: UInt8[np.ndarray, "drawn_h drawn_w 3"], field: Field, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """The canvas at its final size under daylight, a little out of focus, with the noise of a sensor."""
    width, height = field.size
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 0.9)))
    light = daylight(rng, height, width, field.dapple)
    tints = [light * np.float32(tint) for tint in rng.normal(1, 0.035, 3)]
    lit = cv2.multiply(image, cv2.merge(tints), dtype=cv2.CV_32F)
    grains = rng.integers(0, 256, (2, height, width, 3), np.uint8)  # the sum of two even ones is a quick bell
    strength = float(rng.uniform(1.5, 6)) / 104
    noise = cv2.addWeighted(grains[0], strength, grains[1], strength, -255 * strength, dtype=cv2.CV_32F)
    return cv2.add(lit, noise, dtype=cv2.CV_8U)
